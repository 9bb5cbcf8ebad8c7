"""Memory for a paged KV cache that takes from the system what has been written, and gives back what was forgotten."""

from __future__ import annotations

import mmap

import numpy as np

from edge_spec.backends._pages import private_pages

GIVE_BACK = 8
"""Fewest blocks that are worth a call to the system; a draft that was rejected frees one or none."""


class BlockCache:
    """`n_tensors` float32 arrays of `shape` [blocks, ...], each in pages of its own.

    The arrays (`arrays`, writable) stay valid as long as they are held. Pages stay the system's until something is
    written to them, and blocks are used from the first on: memory follows the longest sequence since the last large
    `forget`.
    """

    def __init__(self, n_tensors: int, shape: tuple[int, ...]) -> None:
        self._block_bytes = int(np.prod(shape[1:])) * 4
        self._used = 0
        self._maps = [private_pages(shape[0] * self._block_bytes) for _ in range(n_tensors)]
        self.arrays = [np.frombuffer(pages, np.float32).reshape(shape) for pages in self._maps]

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
        start = -(-kept * self._block_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        length = self._used * self._block_bytes - start
        if length > 0:
            for pages in self._maps:
                pages.madvise(mmap.MADV_DONTNEED, start, length)
        self._used = kept
