"""Arrays in pages of their own: taken from the system as they are written, given back when the array goes."""

from __future__ import annotations

import math
import mmap
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray


def paged_array(shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
    """Zeros in private pages, a writable array. Raises MemoryError.

    An allocator may keep what is freed; these pages are the system's again when the array goes.
    """
    kind = np.dtype(dtype)
    if not math.prod(shape):
        return np.zeros(shape, kind)
    return np.frombuffer(private_pages(math.prod(shape) * kind.itemsize), kind).reshape(shape)


def private_pages(n_bytes: int) -> mmap.mmap:
    """Anonymous memory of this process; only private pages go back to the system when they are not needed.

    Raises MemoryError.
    """
    try:
        if hasattr(mmap, "MAP_PRIVATE"):
            return mmap.mmap(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        return mmap.mmap(-1, n_bytes)
    except (OSError, OverflowError) as exc:
        raise MemoryError(f"{n_bytes} bytes: {exc}") from exc
