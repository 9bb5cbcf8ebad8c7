"""A pass takes longer the more tokens are cached: its attention looks at all of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median

_READING = 3.5
"""Until it is measured: how many times as long as reading weights attention takes for as many bytes of the cache.
On native 16 bits are turned into 32 first, and take as long as twice as many bytes: there it is low."""
_STEEPEST = 0.002
_FARTHEST = 2.0
"""How many times as steep as the guess a measured growth may be, or the guess as it."""
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
        share = min(_STEEPEST, _READING * kv_bytes_per_token / max(1, weight_bytes))
        return cls((1 - _PER_ROW) * share, _PER_ROW * share)


def fit_growth(
    short: Mapping[int, float], long: Mapping[int, float], cached: tuple[int, int], guess: Growth
) -> tuple[Growth, dict[int, float]]:
    """The growth, and the seconds of passes behind nothing by their rows.

    `short` and `long` are seconds by rows, of the same rows, behind the two numbers of `cached` tokens. A few passes of
    each on a machine that does other work say little of a difference of a tenth, so the guess gives the shape, and the
    median over the rows how many times as steep it is, within limits.
    """
    near, far = cached
    first = min(short)
    # Seconds of a pass of the first rows that explain what was seen, if the guess were right.
    one_s = median((long[rows] - short[rows]) / guess.passes(rows, far - near) for rows in short)
    behind_nothing_s = max(short[first] - one_s * guess.passes(first, near), short[first] / 2)
    factor = min(max(one_s / behind_nothing_s, 1 / _FARTHEST), _FARTHEST)
    growth = Growth(factor * guess.fixed, factor * guess.per_row)
    one_s = short[first] / (1 + growth.passes(first, near))
    return growth, {rows: seconds - growth.passes(rows, near) * one_s for rows, seconds in short.items()}
