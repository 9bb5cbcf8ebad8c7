"""How far two sequences agree."""

from __future__ import annotations

_BLOCK = 1024


def common_prefix(left: list[int], right: list[int]) -> int:
    """Length of the longest common prefix.

    Runs at every step over contexts of many thousands of tokens, so blocks are compared by list equality, in C; only
    the block that differs is looked into.
    """
    limit = min(len(left), len(right))
    for start in range(0, limit, _BLOCK):
        stop = min(start + _BLOCK, limit)
        if left[start:stop] != right[start:stop]:
            return _first_difference(left, right, start, stop)
    return limit


def _first_difference(left: list[int], right: list[int], low: int, high: int) -> int:
    """Bisect: the sequences agree before `low` and differ somewhere in [low, high)."""
    while high - low > 1:
        middle = (low + high) // 2
        if left[low:middle] == right[low:middle]:
            low = middle
        else:
            high = middle
    return low
