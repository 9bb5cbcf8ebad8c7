"""What this process holds, read cheaply and often."""

from __future__ import annotations

import os
import sys
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from edge_spec.memory.cgroup import PROC


@dataclass(frozen=True, slots=True)
class Usage:
    """Memory of this process, in bytes."""

    anonymous_bytes: int
    """Held by the process alone: what has to fit, or the process dies."""
    resident_bytes: int
    """That and the pages of mapped files, which the system drops when it needs the room."""


class ProcessMemory(Protocol):
    """Reads the memory of this process."""

    def read(self) -> Usage:
        """What the process holds now."""
        ...


def process_memory() -> ProcessMemory:
    """The reader for this platform."""
    return LinuxMemory() if sys.platform == "linux" else PortableMemory()


class LinuxMemory:
    """From /proc/self/statm, whose file stays open: a reading costs a few microseconds."""

    def __init__(self, proc: Path = PROC) -> None:
        self._file = os.open(proc / "self/statm", os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self._file)
        self._page_bytes = os.sysconf("SC_PAGE_SIZE")

    def read(self) -> Usage:
        """See `ProcessMemory.read`; shared pages count as those of files."""
        _, resident, shared, *_ = map(int, os.pread(self._file, 256, 0).split())
        return Usage((resident - shared) * self._page_bytes, resident * self._page_bytes)


class PortableMemory:
    """Through psutil: private bytes on Windows, the unique set where there is one, else all that is resident."""

    def __init__(self) -> None:
        import psutil

        self._process = psutil.Process()

    def read(self) -> Usage:
        """See `ProcessMemory.read`."""
        info = self._process.memory_info()
        return Usage(int(getattr(info, "private", info.rss)), int(info.rss))


def release_free_memory() -> None:
    """Give what the C library keeps of freed blocks back to the system, where it knows how (glibc).

    After a model was closed that is most of what its small tensors took.
    """
    import ctypes

    if sys.platform != "linux":
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
