"""Weights on huge pages (Linux): a pass reads all of them, and looking up 4 KiB pages costs a share of its time.

Allocators ask for pages of 4 KiB unless the system says otherwise, and most systems leave larger ones to those who ask
(`/sys/kernel/mm/transparent_hugepage/enabled`: madvise). Libraries allocate the weights, so the pages are replaced
afterwards (MADV_COLLAPSE, Linux 6.1), and only where all of the small ones are in memory: nothing more is held.
"""

from __future__ import annotations

import ctypes
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np

BLOCK_BYTES = 2 << 20
"""A huge page where pages have 4 KiB."""

_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_MAPS = Path("/proc/self/maps")
_MADV_COLLAPSE = 25
_LEAST_URGENT = 19


def full_blocks() -> frozenset[int]:
    """Addresses of the blocks of private memory of this process that are wholly in memory; none where huge pages are
    unknown or switched off."""
    system = _system()
    if system is None:
        return frozenset()
    return frozenset(block for start, end in _private_ranges() for block in _full(system, start, end))


def collapse(blocks: frozenset[int]) -> int:
    """Replace the pages of each block by a huge one; returns the bytes that are on huge pages now.

    A block that is gone meanwhile, or for which there is no huge page, stays as it is.
    """
    system = _system()
    if system is None:
        return 0
    moved = [block for block in sorted(blocks) if system.madvise(block, BLOCK_BYTES, _MADV_COLLAPSE) == 0]
    return len(moved) * BLOCK_BYTES


def collapse_when_idle(blocks: frozenset[int]) -> threading.Thread:
    """`collapse` in a thread of its own that runs while no other wants a core."""

    def work() -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LEAST_URGENT)  # of this thread, on Linux
        collapse(blocks)

    thread = threading.Thread(target=work, name="huge-pages", daemon=True)
    if blocks:
        thread.start()
    return thread


def _system() -> Any:
    """The C library, None where there is nothing to call it for."""
    try:
        if "[never]" in _SETTING.read_text("ascii") or os.sysconf("SC_PAGESIZE") != 4096:
            return None
        library = ctypes.CDLL(None)
        library.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        library.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    except (OSError, ValueError, AttributeError):
        return None
    return library


def _private_ranges() -> list[tuple[int, int]]:
    """Writable memory that belongs to no file, in whole blocks."""
    ranges = []
    for line in _MAPS.read_text("utf-8", "surrogateescape").splitlines():
        place, rights, _, _, inode, *name = line.split(maxsplit=5)
        if rights == "rw-p" and inode == "0" and (not name or name[0] == "[heap]"):
            start, end = (int(address, 16) for address in place.split("-"))
            ranges.append((-(-start // BLOCK_BYTES) * BLOCK_BYTES, end // BLOCK_BYTES * BLOCK_BYTES))
    return ranges


def _full(system: Any, start: int, end: int) -> list[int]:
    """The blocks of a range of which every page is in memory."""
    pages = np.zeros(BLOCK_BYTES // 4096, np.uint8)
    return [
        block
        for block in range(start, end, BLOCK_BYTES)
        if system.mincore(block, BLOCK_BYTES, pages.ctypes.data) == 0 and (pages & 1).all()
    ]
