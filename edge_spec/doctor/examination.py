"""Examine a pair on this machine: which thread count, what passes cost, what that makes of speculation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from typing import Any

from edge_spec.assembly import KeptLessons
from edge_spec.backends.alignment import round_up
from edge_spec.backends.base import CausalLM
from edge_spec.cores import RecommendedThreads, usable_cores, usable_processors
from edge_spec.doctor.bandwidth import read_bandwidth
from edge_spec.doctor.passes import PassTime, fill, time_passes
from edge_spec.drafting import Costs, Growth, fit_growth
from edge_spec.loading import Loader, StageProgress, processor_key
from edge_spec.opening import LoadRequest, OpenedModels, open_models
from edge_spec.store import Store
from edge_spec.types import ModelSpec, Output

SHORT, LONG = 256, 768
"""Cached tokens that passes are timed behind."""
TARGET_ROWS = (*range(1, 17), 32)
DRAFT_ROWS = (1, 2, 4, 8)
_TARGET_S, _DRAFT_S, _THREADS_S = 1.3, 0.5, 0.5
"""Seconds for the passes of one visit to a length of context, and of each number of threads; each is timed once at
least."""
_REPEATS = 9
_LEAST_GAIN = 0.03
"""A larger number of threads has to be faster by this share to be recommended."""


@dataclass(frozen=True, slots=True)
class ModelTimes:
    """What one model's passes cost. `row_alignment` is the padding that makes rows independent, None if none does."""

    name: str
    backend: str
    recipe: str
    row_alignment: int | None
    reading_tokens_per_s: float
    passes: tuple[PassTime, ...]

    def seconds(self, rows: int, cached: int = SHORT) -> float | None:
        """A pass over `rows` tokens behind `cached`; None if it was not timed."""
        width = round_up(rows, self.row_alignment or 1)
        found = [p.seconds for p in self.passes if (p.cached, p.rows) == (cached, width)]
        return found[0] if found else None


@dataclass(frozen=True, slots=True)
class Examination:
    """What `examine` found. Seconds, bytes a second, tokens a second."""

    threads: int
    thread_times: Mapping[int, float]
    """Seconds of a pass over one token and one over four together, by number of threads; empty if one was given."""
    read_bandwidth_bytes_per_s: float
    target: ModelTimes
    draft: ModelTimes | None
    costs: Costs

    def to_json(self) -> dict[str, Any]:
        """All of it, and what the costs make of typical acceptance rates."""
        rates = {str(rate): round(self.costs.best_fixed(rate, 7)[0], 2) for rate in (0.5, 0.7, 0.8, 0.9, 0.95)}
        return {
            "threads": self.threads,
            "thread_times": {str(n): seconds for n, seconds in self.thread_times.items()},
            "read_bandwidth_bytes_per_s": round(self.read_bandwidth_bytes_per_s),
            "target": asdict(self.target),
            "draft": asdict(self.draft) if self.draft else None,
            "plain_tokens_per_s": round(1 / self.costs.target_s(1), 2),
            "expected_tokens_per_s_by_acceptance": rates if self.draft else {},
        }


def examine(
    request: LoadRequest, store: Store, *, choose_threads: bool, progress: StageProgress | None = None
) -> Examination:
    """Load what `request` says, time it, and keep what was found for later engines on this machine.

    `choose_threads` tries other numbers of threads than the request's, loading the target once for each. The default
    pair takes less than half a minute on two cores. Raises what `Engine.load` raises.
    """
    request = replace(request, n_ctx=min(request.n_ctx, LONG + 2 * max(TARGET_ROWS)))
    thread_times = _try_threads(request, store, progress) if choose_threads else {}
    if thread_times:
        request = replace(request, threads=_best(thread_times))
        RecommendedThreads(store.cache_dir).put(processor_key(request.backend), request.threads)
    opened = open_models(request, store, progress)
    loaded = {"target": opened.target, "draft": opened.draft}
    try:
        times = {}
        for role, rows, budget_s, want in (
            ("target", TARGET_ROWS, _TARGET_S, Output.LOGITS),
            ("draft", DRAFT_ROWS, _DRAFT_S, Output.TOP_K),
        ):
            if (one := loaded[role]) is not None:
                _report(progress, f"time {one.model.spec.name}", 0)
                speed, passes = _time_model(one.model, rows, budget_s, want)
                spec = one.model.spec
                times[role] = ModelTimes(spec.name, one.backend, one.recipe, spec.row_alignment, speed, passes)
                _report(progress, f"time {one.model.spec.name}", 1)
        costs = costs_from(opened, times["target"], times.get("draft"))
        KeptLessons.of(request, opened, store).put(costs)
    finally:
        for one in loaded.values():
            if one is not None:
                one.model.close()
    return Examination(
        threads=request.threads,
        thread_times=thread_times,
        read_bandwidth_bytes_per_s=read_bandwidth(request.threads),
        target=times["target"],
        draft=times.get("draft"),
        costs=costs,
    )


def costs_from(opened: OpenedModels, target: ModelTimes, draft: ModelTimes | None) -> Costs:
    """What was timed, as the planner wants it; for passes behind `SHORT` tokens until it is told of others."""
    spec = opened.target.model.spec
    costs = Costs(max_rows=spec.max_rows, alignment=spec.row_alignment or 1)
    growth, bases = _growth(target, spec, spec.max_rows)
    kept: dict[str, object] = {"target": {str(rows): seconds for rows, seconds in bases.items()}}
    if draft is not None and opened.draft is not None:
        draft_growth, draft_bases = _growth(draft, opened.draft.model.spec, max(DRAFT_ROWS))
        kept |= {"draft_s": draft_bases[min(draft_bases)], "read_s": 1 / draft.reading_tokens_per_s}
        kept |= {"draft_growth": _shares(draft_growth)} if draft_growth else {}
    costs.restore(kept | ({"growth": _shares(growth)} if growth else {}))
    costs.move(SHORT)
    return costs


def _growth(times: ModelTimes, spec: ModelSpec, max_rows: int) -> tuple[Growth | None, dict[int, float]]:
    """What a cached token adds, None if one length only was timed; and seconds by rows behind nothing."""
    short, long = (
        {p.rows: p.seconds for p in times.passes if p.cached == cached and p.rows <= max_rows}
        for cached in (SHORT, LONG)
    )
    guess = Growth.guess(spec.kv_bytes_per_token, spec.weight_bytes)
    return fit_growth(short, long, (SHORT, LONG), guess) if long else (None, short)


def _shares(growth: Growth) -> list[float]:
    return [growth.fixed, growth.per_row]


def _time_model(
    model: CausalLM, rows: Sequence[int], budget_s: float, want: Output
) -> tuple[float, tuple[PassTime, ...]]:
    """Tokens a second of reading, and the passes behind both lengths of context."""
    alignment = model.spec.row_alignment or 1
    widths = sorted({round_up(n, alignment) for n in rows})
    fill(model, SHORT)
    before = time_passes(model, widths, repeats=_REPEATS, budget_s=budget_s, want=want)
    if model.spec.n_ctx < LONG + max(widths):
        model.rollback(0)
        return fill(model, SHORT), tuple(before)
    speed = fill(model, LONG)
    long = time_passes(model, widths, repeats=_REPEATS, budget_s=budget_s, want=want)
    # Once more behind the short context: a machine that slowed down meanwhile would look like one that dislikes length.
    model.rollback(SHORT)
    after = time_passes(model, widths, repeats=_REPEATS, budget_s=budget_s, want=want)
    short = [replace(one, seconds=(one.seconds + other.seconds) / 2) for one, other in zip(before, after, strict=True)]
    return speed, (*short, *long)


def _try_threads(request: LoadRequest, store: Store, progress: StageProgress | None) -> dict[int, float]:
    """Seconds of short passes by number of threads, of those that are worth trying."""
    tried = {}
    for threads in sorted({max(1, usable_cores() // 2), usable_cores(), usable_processors()}):
        loader = Loader(store=store, backend=request.backend, threads=threads, progress=progress)
        loaded = loader.load(request.source, n_ctx=SHORT, recipe=request.recipe, aligned=False)
        with closing(loaded.model) as model:
            fill(model, SHORT // 8)
            passes = time_passes(model, (1, 4), repeats=_REPEATS, budget_s=_THREADS_S)
            tried[threads] = sum(time.seconds for time in passes)
    return tried


def _best(times: Mapping[int, float]) -> int:
    best = min(times)
    for threads in sorted(times):
        if times[threads] < times[best] * (1 - _LEAST_GAIN):
            best = threads
    return best


def _report(progress: Callable[[str, int, int], object] | None, stage: str, done: int) -> None:
    if progress is not None:
        progress(stage, done, 1)
