"""Memory for a paged KV cache that takes from the system what has been written, and gives back what was forgotten."""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from edge_spec.backends._pages import private_pages

GIVE_BACK = 8
"""Fewest blocks that are worth a call to the system; a draft that was rejected frees one or none."""


class BlockCache:
    """Arrays of `shapes` [blocks, ...], as many blocks each, in pages of their own.

    The arrays (`arrays`, writable) stay valid as long as they are held. Pages stay the system's until something is
    written to them, and blocks are used from the first on: memory follows the longest sequence since the last large
    `forget`.
    """

    def __init__(self, shapes: Sequence[tuple[int, ...]], dtype: DTypeLike) -> None:
        kind = np.dtype(dtype)
        self._used = 0
        self._block_bytes = [math.prod(shape[1:]) * kind.itemsize for shape in shapes]
        sizes = [shape[0] * n_bytes for shape, n_bytes in zip(shapes, self._block_bytes, strict=True)]
        self._maps = [private_pages(size) for size in sizes]
        self.arrays: list[NDArray[Any]] = [
            np.frombuffer(pages, kind).reshape(shape) for pages, shape in zip(self._maps, shapes, strict=True)
        ]

    def take(self, other: BlockCache, blocks: int) -> None:
        """Copy the first `blocks` blocks of another cache, which is emptied tensor by tensor."""
        self.use(blocks)
        for array, old, pages in zip(self.arrays, other.arrays, other._maps, strict=True):
            array[:blocks] = old[:blocks]
            if hasattr(mmap, "MADV_DONTNEED"):
                pages.madvise(mmap.MADV_DONTNEED)

    def use(self, blocks: int) -> None:
        """Say that the first `blocks` blocks are about to be written."""
        self._used = max(self._used, blocks)

    def forget(self, kept: int) -> None:
        """Keep the first `kept` blocks; the system gets the others' memory, if they are many."""
        if self._used - kept < GIVE_BACK or not hasattr(mmap, "MADV_DONTNEED"):
            return
        for pages, n_bytes in zip(self._maps, self._block_bytes, strict=True):
            start = -(-kept * n_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
            length = self._used * n_bytes - start
            if length > 0:
                pages.madvise(mmap.MADV_DONTNEED, start, length)
        self._used = kept
