"""What the runs say: rates and ratios by task and overall."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import reduce
from typing import Any

from edge_spec.benchmark.repeats import Repeats, summarise_repeats
from edge_spec.benchmark.runs import Pair, Run, sum_drafters
from edge_spec.types import DrafterStats


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskFigures:
    """The prompts of one task. None where nothing was measured: no answer of several steps, no draft."""

    prompts: int
    plain_tokens_per_s: float | None
    """All decoded tokens over all decode time, of the prompts that have a ratio."""
    speculative_tokens_per_s: float | None
    ratio: float | None
    """Of the two rates."""
    worst_ratio: float | None
    """The smallest of the prompts' ratios."""
    tokens_per_step: float | None
    acceptance_rate: float | None
    ttft_s: float
    """Median time to the first token, speculatively."""
    ttft_ratio: float | None
    """Median of the prompts' ratios, speculative over plain: below 1 is faster."""
    same_answers: int
    """Prompts that were answered with the same ids both ways."""
    drafters: dict[str, DrafterStats]
    """What each drafter did; "none" counts the steps without a draft."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """The figures of a whole benchmark."""

    tasks: dict[str, TaskFigures]
    geomean_ratio: float | None
    """Geometric mean of the tasks' ratios: each task counts the same, however long its answers."""
    worst_ratio: float | None
    """The smallest ratio of a prompt, which is `worst_prompt`."""
    worst_prompt: str | None
    same_answers: int
    own_share: float | None
    """Drafters, planner, verification and bookkeeping: share of the speculative steps outside of the models' passes."""
    notes: list[str] = field(default_factory=list)
    repeats: Repeats | None = None
    """The worst prompts once more, many times; the pairs that made them the worst are not among them."""

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


def summarise(pairs: Sequence[Pair], notes: Sequence[str] = (), repeated: Sequence[Pair] = ()) -> Report:
    """The figures of `pairs`, of which there is at least one, and of those that were `repeated`."""
    by_task: dict[str, list[Pair]] = {}
    for pair in pairs:
        by_task.setdefault(pair.prompt.task, []).append(pair)
    tasks = {task: _summarise_task(chosen) for task, chosen in by_task.items()}
    ratios = [figures.ratio for figures in tasks.values() if figures.ratio is not None]
    worst = min(((pair.ratio, pair.prompt.id) for pair in pairs if pair.ratio is not None), default=(None, None))
    steps_s = sum(pair.speculative.steps_s for pair in pairs)
    return Report(
        tasks=tasks,
        geomean_ratio=statistics.geometric_mean(ratios) if ratios else None,
        worst_ratio=worst[0],
        worst_prompt=worst[1],
        same_answers=sum(pair.same_answers for pair in pairs),
        own_share=sum(pair.speculative.own_s for pair in pairs) / steps_s if steps_s > 0 else None,
        notes=list(notes),
        repeats=summarise_repeats(repeated),
    )


def _summarise_task(pairs: Sequence[Pair]) -> TaskFigures:
    speculative = [pair.speculative for pair in pairs]
    measured = [pair for pair in pairs if pair.ratio is not None]
    plain_rate, rate = _rate([pair.plain for pair in measured]), _rate([pair.speculative for pair in measured])
    steps, drafted, accepted = (
        sum(getattr(run, name) for run in speculative) for name in ("steps", "drafted", "accepted")
    )
    ttft_ratios = [pair.speculative.ttft_s / pair.plain.ttft_s for pair in pairs if pair.plain.ttft_s > 0]
    drafters: dict[str, DrafterStats] = reduce(sum_drafters, (run.drafters for run in speculative), {})
    return TaskFigures(
        prompts=len(pairs),
        plain_tokens_per_s=plain_rate,
        speculative_tokens_per_s=rate,
        ratio=rate / plain_rate if rate is not None and plain_rate is not None else None,
        worst_ratio=min((pair.ratio for pair in measured if pair.ratio is not None), default=None),
        tokens_per_step=1 + accepted / steps if steps else None,
        acceptance_rate=accepted / drafted if drafted else None,
        ttft_s=statistics.median(run.ttft_s for run in speculative),
        ttft_ratio=statistics.median(ttft_ratios) if ttft_ratios else None,
        same_answers=sum(pair.same_answers for pair in pairs),
        drafters=drafters,
    )


def _rate(runs: Sequence[Run]) -> float | None:
    decode_s = sum(run.decode_s for run in runs)
    return sum(run.decoded_tokens for run in runs) / decode_s if decode_s > 0 else None
