"""A few prompts, answered both ways many times: how far a ratio can be believed."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from math import comb

from edge_spec.benchmark.runs import Pair
from edge_spec.benchmark.workload import Prompt

COVERAGE = 0.95
"""Chance that an interval should hold the median, where there are values enough for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RepeatedRatio:
    """Ratios of pairs of runs: their median, and between which two of them its true value lies."""

    pairs: int
    median_ratio: float
    interval: tuple[float, float]
    coverage: float
    """Chance that an interval made like this one holds the median; less than `COVERAGE` below six pairs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Repeats:
    """The repeated prompts by their ids, and all their pairs together."""

    prompts: dict[str, RepeatedRatio]
    overall: RepeatedRatio


def worst_prompts(pairs: Sequence[Pair], count: int) -> list[Prompt]:
    """The prompts with the `count` smallest ratios, the worst first; those without a ratio are never among them."""
    measured = sorted(((pair.ratio, number) for number, pair in enumerate(pairs) if pair.ratio is not None))
    return [pairs[number].prompt for _, number in measured[:count]]


def summarise_repeats(pairs: Sequence[Pair]) -> Repeats | None:
    """The figures of repeated pairs; None where none has a ratio.

    All pairs together are drawn from several prompts in equal shares, which makes an interval by order statistics wider
    than it had to be, never too narrow (Hoeffding 1956: the number of values below the median varies less).
    """
    ratios: dict[str, list[float]] = {}
    for pair in pairs:
        if pair.ratio is not None:
            ratios.setdefault(pair.prompt.id, []).append(pair.ratio)
    if not ratios:
        return None
    together = [ratio for values in ratios.values() for ratio in values]
    return Repeats(prompts={name: _summarise(values) for name, values in ratios.items()}, overall=_summarise(together))


def median_interval(values: Sequence[float], coverage: float = COVERAGE) -> tuple[tuple[float, float], float]:
    """The values between which the median lies, and the chance of that: an interval by order statistics.

    It assumes nothing of how the values are distributed: each is above the median with a chance of one half. The
    narrowest interval from the k-th smallest to the k-th largest value that has the `coverage`, or from the smallest to
    the largest where none has.
    """
    ordered, n = sorted(values), len(values)
    assert n, "no values"
    outside = 2 * 0.5**n  # the chance that the median is not between the first and the last
    k = 1
    while 2 * (k + 1) <= n + 1 and outside + 2 * comb(n, k) * 0.5**n <= 1 - coverage:
        outside += 2 * comb(n, k) * 0.5**n
        k += 1
    return (ordered[k - 1], ordered[n - k]), max(0.0, 1 - outside)


def _summarise(ratios: Sequence[float]) -> RepeatedRatio:
    interval, coverage = median_interval(ratios)
    return RepeatedRatio(
        pairs=len(ratios), median_ratio=statistics.median(ratios), interval=interval, coverage=coverage
    )
