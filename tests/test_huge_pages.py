"""Weights on huge pages: the same bytes, the same memory."""

from __future__ import annotations

import ctypes
import mmap
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from edge_spec.memory.huge_pages import BLOCK_BYTES, collapse, collapse_when_idle, full_blocks

SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not SETTING.exists() or "[never]" in SETTING.read_text("ascii"),
    reason="this system has no huge pages",
)
_BLOCKS = 4


def _memory() -> tuple[mmap.mmap, np.ndarray, list[int]]:
    """Private memory that nobody has touched, its bytes, and the addresses of its whole blocks."""
    area = mmap.mmap(-1, (_BLOCKS + 1) * BLOCK_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    values = np.frombuffer(area, np.uint8)
    offset = -values.ctypes.data % BLOCK_BYTES
    values = values[offset : offset + _BLOCKS * BLOCK_BYTES]
    return area, values, [values.ctypes.data + i * BLOCK_BYTES for i in range(_BLOCKS)]


def _in_memory_kib(address: int) -> int:
    """Of the mapping that holds an address."""
    inside = False
    for line in Path("/proc/self/smaps").read_text("utf-8", "surrogateescape").splitlines():
        if place := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(place[1], 16) <= address < int(place[2], 16)
        elif inside and line.startswith("Rss:"):
            return int(line.split()[1])
    raise AssertionError("no such mapping")


def test_a_block_counts_once_all_its_pages_are_in_memory() -> None:
    _area, values, blocks = _memory()
    values[: 2 * BLOCK_BYTES : 4096] = 1  # two blocks whole, of the third one page
    values[2 * BLOCK_BYTES] = 1
    assert full_blocks() & set(blocks) == set(blocks[:2])


def test_collapsing_keeps_the_bytes_and_holds_no_more() -> None:
    _area, values, blocks = _memory()
    written = values[: 3 * BLOCK_BYTES]
    written[:] = np.arange(len(written), dtype=np.uint32).view(np.uint8)[: len(written)]
    before, held = written.copy(), _in_memory_kib(blocks[0])
    moved = collapse(full_blocks() & set(blocks))
    assert np.array_equal(written, before)
    assert _in_memory_kib(blocks[0]) == held
    if tuple(int(part) for part in os.uname().release.split(".")[:2]) >= (6, 1):
        assert moved == len(written)


def test_memory_that_is_gone_stays_gone() -> None:
    library = ctypes.CDLL(None)
    library.mmap.restype = ctypes.c_void_p
    library.mmap.argtypes = [ctypes.c_void_p, *[ctypes.c_size_t] * 5]
    library.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    start = library.mmap(None, 2 * BLOCK_BYTES, mmap.PROT_READ, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, 2**64 - 1, 0)
    block = -(-start // BLOCK_BYTES) * BLOCK_BYTES
    library.munmap(start, 2 * BLOCK_BYTES)
    assert collapse(frozenset([block])) == 0


def test_the_thread_ends_and_nothing_to_do_starts_none() -> None:
    _area, values, blocks = _memory()
    values[:] = 7
    thread = collapse_when_idle(frozenset(blocks))
    thread.join(30)
    assert not thread.is_alive()
    assert (values == 7).all()
    assert not collapse_when_idle(frozenset()).is_alive()
