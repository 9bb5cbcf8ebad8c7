"""How fast the processor reads memory: a token costs at least the time to read the weights once."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from time import perf_counter

import numpy as np

_BYTES = 256 << 20
"""Of all threads together: far more than any cache holds."""
_PASSES = 4


def read_bandwidth(threads: int) -> float:
    """Bytes a second that `threads` threads read together; the best of a few passes over 256 MiB."""
    parts = [np.ones(_BYTES // threads // 8, np.int64) for _ in range(threads)]
    best_s = float("inf")
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(_PASSES):
            started = perf_counter()
            list(pool.map(np.max, parts))  # numpy lets go of the interpreter meanwhile
            best_s = min(best_s, perf_counter() - started)
    return sum(part.nbytes for part in parts) / best_s
