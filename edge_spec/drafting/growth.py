"""A pass takes longer the more tokens are cached: its attention looks at all of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

_READING = 3.5
"""Until it is measured: how many times as long as reading weights attention takes for as many bytes of the cache."""
_STEEPEST = 0.002
_PER_ROW = 0.1
"""Until it is measured: of what a cached token adds to a pass of one row, the share that each row adds anew."""


@dataclass(frozen=True, slots=True)
class Growth:
    """What each cached token adds to a pass of n rows: `fixed + per_row * n`, in passes of one row behind nothing."""

    fixed: float = 0.0
    per_row: float = 0.0

    def passes(self, rows: int, cached: int) -> float:
        """What `cached` tokens add to a pass of `rows` rows."""
        return (self.fixed + self.per_row * rows) * cached

    @classmethod
    def guess(cls, kv_bytes_per_token: int, weight_bytes: int) -> Growth:
        """Of a model whose passes nobody has timed."""
        share = min(_STEEPEST, _READING * kv_bytes_per_token / weight_bytes)
        return cls((1 - _PER_ROW) * share, _PER_ROW * share)


def fit_growth(
    short: Mapping[int, float], long: Mapping[int, float], cached: tuple[int, int]
) -> tuple[Growth, dict[int, float]]:
    """The growth, and the seconds of passes behind nothing by their rows.

    `short` and `long` are seconds by rows, of the same rows, behind the two numbers of `cached` tokens. What a token
    adds is a line through all of them, by least squares with errors in proportion to the passes.
    """
    near, far = cached
    slopes = {rows: (long[rows] - short[rows]) / (far - near) for rows in short}
    weights = {rows: 1 / short[rows] ** 2 for rows in short}
    total = sum(weights.values())
    mean_rows = sum(weights[rows] * rows for rows in short) / total
    mean = sum(weights[rows] * slopes[rows] for rows in short) / total
    spread = sum(weights[rows] * (rows - mean_rows) ** 2 for rows in short)
    steepness = sum(weights[rows] * (rows - mean_rows) * (slopes[rows] - mean) for rows in short)
    per_row = min(max(0.0, steepness / spread if spread else 0.0), max(0.0, mean / mean_rows))
    fixed = max(0.0, mean - per_row * mean_rows)
    # No pass is nothing but attention: what noise makes of a fit may not say so.
    bases = {rows: max(short[rows] - near * (fixed + per_row * rows), short[rows] / 2) for rows in short}
    one = bases[min(bases)]
    return Growth(min(fixed / one, _STEEPEST), min(per_row / one, _STEEPEST)), bases
