"""Memory for a paged KV cache: blocks that several sequences may hold, taken from the system as they are written."""

from __future__ import annotations

import heapq
import math
import mmap
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from edge_spec.backends._pages import private_pages

GIVE_BACK = 8
"""Fewest free blocks that are worth a call to the system; a draft that was rejected frees one or none."""

Blocks = NDArray[np.int32]
"""Numbers of blocks, [n]; as a table, those of a sequence in the order of its tokens."""


class BlockPool:
    """Arrays of `shapes` [blocks, ...], as many blocks each, in pages of their own.

    The arrays (`arrays`, writable) stay valid as long as they are held. A block has as many holders as were counted;
    without one it is free, and free blocks' pages go back to the system once they are many. Pages are the system's
    until something is written to them, and blocks that were written before are the first to be taken again: memory
    follows what is held.
    """

    def __init__(self, shapes: Sequence[tuple[int, ...]], dtype: DTypeLike) -> None:
        kind = np.dtype(dtype)
        self._array_bytes = [math.prod(shape[1:]) * kind.itemsize for shape in shapes]
        self._count = shapes[0][0]
        sizes = [shape[0] * n_bytes for shape, n_bytes in zip(shapes, self._array_bytes, strict=True)]
        self._maps = [private_pages(size) for size in sizes]
        self.arrays: list[NDArray[Any]] = [
            np.frombuffer(pages, kind).reshape(shape) for pages, shape in zip(self._maps, shapes, strict=True)
        ]
        self.holders = np.zeros(self._count, np.int32)
        """How many hold each block."""
        self._written: list[int] = []
        """Free, with pages; the latest last."""
        self._untouched = list(range(self._count))
        """Free, without pages; a heap."""

    @property
    def block_bytes(self) -> int:
        """Bytes of a block in all arrays."""
        return sum(self._array_bytes)

    def take(self, count: int) -> Blocks:
        """`count` free blocks, with one holder each now. Raises MemoryError, with nothing taken, if there are fewer."""
        if count > len(self._written) + len(self._untouched):
            raise MemoryError(f"{count} more blocks, and {self._count} are all that there are")
        taken = [self._written.pop() if self._written else heapq.heappop(self._untouched) for _ in range(count)]
        blocks = np.array(taken, np.int32)
        self.holders[blocks] = 1
        return blocks

    def hold(self, blocks: Blocks) -> None:
        """One holder more for each of a sequence's blocks."""
        self.holders[blocks] += 1

    def drop(self, blocks: Blocks) -> None:
        """One holder less; the system gets the memory of blocks without one, if they are many."""
        self.holders[blocks] -= 1
        self._written += blocks[self.holders[blocks] == 0].tolist()
        if len(self._written) >= GIVE_BACK and hasattr(mmap, "MADV_DONTNEED"):
            self._give_back()

    def recount(self, tables: Iterable[Blocks]) -> None:
        """Count the holders anew: each of these tables, and nobody else. The system gets the memory of all the rest.

        Puts right what an interrupt in the middle of the above has left.
        """
        self.holders[:] = 0
        for table in tables:
            self.holders[table] += 1
        self._written, self._untouched = np.flatnonzero(self.holders == 0).tolist(), []
        if hasattr(mmap, "MADV_DONTNEED"):
            self._give_back()

    def copy(self, source: Blocks, target: Blocks) -> None:
        """Write what is in some blocks into others."""
        for array in self.arrays:
            array[target] = array[source]

    def take_over(self, other: BlockPool, blocks: Blocks) -> None:
        """Copy some blocks of another pool to the first ones of this empty one, holders too.

        The other one's memory goes tensor by tensor.
        """
        self.holders[self.take(len(blocks))] = other.holders[blocks]
        for array, old, pages in zip(self.arrays, other.arrays, other._maps, strict=True):
            array[: len(blocks)] = old[blocks]
            if hasattr(mmap, "MADV_DONTNEED"):
                pages.madvise(mmap.MADV_DONTNEED)

    def _give_back(self) -> None:
        """Whole pages only: of one that a block in use reaches into nothing goes."""
        free = sorted(self._written)
        runs = [[block for _, block in run] for _, run in groupby(enumerate(free), lambda pair: pair[1] - pair[0])]
        for pages, n_bytes in zip(self._maps, self._array_bytes, strict=True):
            for run in runs:
                start = -(-run[0] * n_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
                end = (run[-1] + 1) * n_bytes // mmap.PAGESIZE * mmap.PAGESIZE
                if end > start:
                    pages.madvise(mmap.MADV_DONTNEED, start, end - start)
        self._written.clear()
        for block in free:
            heapq.heappush(self._untouched, block)
