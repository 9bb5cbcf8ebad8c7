"""Time a pair on every backend that is installed, in one run and in turn, and keep what is fastest.

Each model on each backend is a process of its own; one works, the others wait. So a machine that slows down slows all
of them, and no library's threads take the cores from another's.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from statistics import median
from time import perf_counter, sleep
from typing import Any

from edge_spec.backend_choice import AUTO, BackendProfile, BackendTimes, Choice, choose_backends
from edge_spec.cores import check_threads
from edge_spec.decoding.session import PREFILL_CHUNK
from edge_spec.doctor.contestant import Contestant, Job
from edge_spec.errors import BackendError, UsageError
from edge_spec.loading import (
    BACKENDS,
    StageProgress,
    chosen_recipe,
    draft_recipe,
    find_source,
    installed_backends,
    running_backends,
)
from edge_spec.opening import LoadOptions, named_models, profile_key
from edge_spec.store import Store

CACHED, READ = 256, 1024
"""Tokens that passes are timed behind, and that are read; fewer where the model's own window is short."""
ROWS = (*range(1, 9), 10, 12, 14, 16, 24, 32)
ROLES = ("target", "draft")
_SECONDS = {"target": 15.0, "draft": 9.0}
"""Of passes, all backends together."""
_LEAST_ROUNDS, _MOST_ROUNDS = 3, 15
_SETTLE_S = 0.05
"""Until the threads of the one that worked last have stopped spinning."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendFigures:
    """One model on one backend. `pass_s`: median seconds of a pass by its rows; memory, with all that was read cached,
    is of the whole process: the interpreter and the tokenizer are in it."""

    backend: str
    engine: str
    recipe: str
    row_alignment: int | None
    load_s: float
    read_tokens_per_s: float
    pass_s: Mapping[int, float]
    anonymous_bytes: int
    mapped_bytes: int


@dataclass(frozen=True, slots=True)
class ModelComparison:
    """A model on all backends, the first of which is what the others are measured by. `failed`: why one is missing.

    Passes were timed behind `cached` tokens; memory and the speed of reading are of `read` tokens.
    """

    name: str
    threads: int
    cached: int
    read: int
    rounds: int
    figures: tuple[BackendFigures, ...]
    failed: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Comparison:
    """What `compare` found, and what `backend="auto"` makes of it; None where the target was never compared."""

    models: Mapping[str, ModelComparison]
    choice: Choice | None
    took_s: float

    def to_json(self) -> dict[str, Any]:
        """All of it."""
        return {
            "models": {role: asdict(model) for role, model in self.models.items()},
            "choice": asdict(self.choice) if self.choice else None,
            "took_s": round(self.took_s, 1),
        }


def compare(
    options: LoadOptions, store: Store, *, roles: Collection[str] = ROLES, progress: StageProgress | None = None
) -> Comparison:
    """Compare the installed backends for the models of `options`, and keep the times for `backend="auto"`.

    The default pair takes a minute and a half on two cores, once it is exported. Raises UsageError where the roles have
    no model, BackendError where no backend runs one, and what finding the models raises.
    """
    started = perf_counter()
    options.check()
    target, draft = named_models(options, store)
    threads = check_threads(options.threads)
    names = {role: name for role, name in (("target", target), ("draft", draft)) if name is not None}
    if not names.keys() & set(roles):
        raise UsageError("there is no draft model to compare the backends for")
    profile, models, keys = BackendProfile(store.cache_dir), {}, {}
    for role, name in names.items():
        source = find_source(store, name)
        recipe = chosen_recipe(options.recipe, AUTO, source) if role == "target" else draft_recipe(source)
        keys[role] = profile_key(source, recipe)
        if role not in roles:
            continue
        jobs = [
            Job(
                model=str(name),
                backend=backend,
                is_draft=role == "draft",
                threads=threads,
                n_ctx=min(READ + 2 * max(ROWS), source.n_ctx_train),
                recipe=options.recipe if role == "target" else None,
                pad_rows=options.pad_rows,
            )
            for backend in running_backends(source)
            if backend in installed_backends()
        ]
        models[role] = _compare(source.name, jobs, _SECONDS[role], progress)
        profile.put(keys[role], _times(models[role]))
    # Of a model that was left out an earlier comparison may have told.
    kept = {role: profile.get(key) for role, key in keys.items()}
    choice = None
    if kept["target"]:
        choice = choose_backends(tuple(kept["target"]), kept["target"], kept.get("draft"))
    return Comparison(models, choice, perf_counter() - started)


def _compare(name: str, jobs: Sequence[Job], budget_s: float, progress: StageProgress | None) -> ModelComparison:
    def report(stage: str, done: int, total: int) -> None:
        if progress is not None:
            progress(stage, done, total)

    failed: dict[str, str] = {}
    with ExitStack() as stack:
        ready: dict[str, Contestant] = {}
        for job in jobs:
            report(f"load {name} on {job.backend}", 0, 1)
            try:
                ready[job.backend] = stack.enter_context(closing(Contestant(job)))
            except BackendError as exc:
                failed[job.backend] = str(exc)
        if not ready:
            reasons = "; ".join(f"{backend}: {reason}" for backend, reason in failed.items())
            raise BackendError(f"no backend runs {name}: {reasons}")
        n_ctx = jobs[0].n_ctx
        read = READ if n_ctx >= READ + max(ROWS) else n_ctx // 2
        cached, chunks = min(CACHED, read), -(-read // PREFILL_CHUNK)
        read_s = dict.fromkeys(ready, 0.0)
        for chunk in range(chunks):
            report(f"read on {len(ready)} backends", chunk, chunks)
            for backend in _turn(list(ready), chunk):
                read_s[backend] += ready[backend].read(min(PREFILL_CHUNK, read - chunk * PREFILL_CHUNK))
        memory = {backend: contestant.memory() for backend, contestant in ready.items()}
        passes, rounds = _time_in_turn(ready, cached, budget_s, report)
    figures = tuple(
        BackendFigures(
            backend=backend,
            engine=contestant.loaded.engine,
            recipe=contestant.loaded.recipe,
            row_alignment=contestant.loaded.row_alignment,
            load_s=contestant.loaded.load_s,
            read_tokens_per_s=read / read_s[backend],
            pass_s=passes[backend],
            anonymous_bytes=memory[backend][0],
            mapped_bytes=memory[backend][1],
        )
        for backend, contestant in ready.items()
    )
    return ModelComparison(name, jobs[0].threads, cached, read, rounds, figures, failed)


def _time_in_turn(
    ready: Mapping[str, Contestant], cached: int, budget_s: float, report: Callable[[str, int, int], object]
) -> tuple[dict[str, dict[int, float]], int]:
    """Median seconds of passes by backend and rows, and the number of rounds."""
    times: dict[str, list[dict[int, float]]] = {backend: [] for backend in ready}
    started, rounds = perf_counter(), 0
    while rounds < _LEAST_ROUNDS or (rounds < _MOST_ROUNDS and perf_counter() - started < budget_s):
        report(f"time passes on {len(ready)} backends", rounds, _MOST_ROUNDS)
        for backend in _turn(list(ready), rounds):
            times[backend].append(ready[backend].time(list(ROWS), cached))
        rounds += 1
    return {backend: {n: median(one[n] for one in taken) for n in ROWS} for backend, taken in times.items()}, rounds


def _turn(backends: Sequence[str], turn: int) -> Iterator[str]:
    """The backends in the order of this turn, each after a moment of rest."""
    first = turn % len(backends)
    for backend in (*backends[first:], *backends[:first]):
        sleep(_SETTLE_S)
        yield backend


def _times(model: ModelComparison) -> dict[str, BackendTimes]:
    return {
        one.backend: BackendTimes(one.engine, model.threads, one.row_alignment, one.pass_s)
        for one in sorted(model.figures, key=lambda one: BACKENDS.index(one.backend))
    }
