"""Pages of a mapped file that a library has read and copied, given back to the system."""

from __future__ import annotations

import ctypes
import mmap
import re
from pathlib import Path

_MAPPING = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) \S+ \S+ \S+ \d+ +(.*)$")


def drop_file_pages(file: Path) -> None:
    """Let the system drop this process's pages of a file that a library has mapped; those needed again come back.

    A library does not tell where it mapped a file, but Linux does; elsewhere nothing happens. A mapping of which a page
    was written to is left alone.
    """
    try:
        lines = Path("/proc/self/smaps").read_text("utf-8", "surrogateescape").splitlines()
        madvise = ctypes.CDLL(None).madvise
    except (OSError, AttributeError, TypeError):
        return
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    start = end = 0
    for line in lines:
        if mapping := _MAPPING.match(line):
            wanted = mapping[3] == str(file)
            start, end = (int(mapping[i], 16) if wanted else 0 for i in (1, 2))
        elif end and line.split() == ["Anonymous:", "0", "kB"]:
            madvise(start, end - start, mmap.MADV_DONTNEED)
