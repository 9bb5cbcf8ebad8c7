"""How much memory this process may take: what its control groups, its own limits and the free memory leave.

The room is the least of (limit - current + file pages) over all the groups above the process, the memory that is
available less a reserve for everybody else, and what the process limits leave.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from edge_spec.memory.cgroup import PROC, limited_cgroups
from edge_spec.memory.process import Usage, process_memory
from edge_spec.sizes import format_size

RESERVE_SHARE, LEAST_RESERVE_BYTES, MOST_RESERVE_BYTES = 0.05, 128 << 20, 1 << 30
"""Of the machine's memory, what is left to the system and the other programs."""

_UNLIMITED = 1 << 62


@dataclass(frozen=True, slots=True)
class Budget:
    """Most bytes that the process may hold in all, what it holds already included, and what sets that limit."""

    n_bytes: int
    source: str

    def __str__(self) -> str:
        return f"{format_size(self.n_bytes)} ({self.source})"


@dataclass(frozen=True, slots=True)
class Room:
    """Bytes that the process can still take, by one rule."""

    n_bytes: int
    source: str


def reserve_bytes(total_bytes: int) -> int:
    """What to leave to the others on a machine with `total_bytes`: 5 %, at least 128 MiB and at most 1 GiB."""
    return min(MOST_RESERVE_BYTES, max(LEAST_RESERVE_BYTES, int(total_bytes * RESERVE_SHARE)))


def machine_budget(usage: Usage | None = None, proc: Path = PROC) -> Budget:
    """The budget that the machine gives: what the process holds now and the least of all the rooms."""
    usage = usage or process_memory().read()
    room = min(rooms(proc), key=lambda one: one.n_bytes)
    return Budget(usage.anonymous_bytes + room.n_bytes, room.source)


def rooms(proc: Path = PROC) -> list[Room]:
    """Every rule's room; at least that of the available memory."""
    return [_available(proc), *_in_groups(proc), *_in_limits(proc)]


def _available(proc: Path) -> Room:
    meminfo = read_sizes(proc / "meminfo")
    if "MemAvailable" in meminfo and "MemTotal" in meminfo:
        available, total = meminfo["MemAvailable"], meminfo["MemTotal"]
    else:
        import psutil

        memory = psutil.virtual_memory()
        available, total = int(memory.available), int(memory.total)
    reserve = reserve_bytes(total)
    return Room(max(0, available - reserve), f"available memory less a reserve of {format_size(reserve)}")


def _in_groups(proc: Path) -> Iterator[Room]:
    for group in limited_cgroups(proc) if sys.platform == "linux" else []:
        yield Room(group.room_bytes, f"the control group {group.path}, limited to {format_size(group.limit_bytes)}")


def _in_limits(proc: Path) -> Iterator[Room]:
    """RLIMIT_DATA and RLIMIT_AS, which count what was asked for, touched or not."""
    if sys.platform != "linux":
        return
    import resource

    sizes = read_sizes(proc / "self/status")
    for name, size in (("RLIMIT_DATA", "VmData"), ("RLIMIT_AS", "VmSize")):
        limit, _ = resource.getrlimit(getattr(resource, name))
        if 0 <= limit < _UNLIMITED and size in sizes:
            yield Room(max(0, limit - sizes[size]), f"the limit {name} of {format_size(limit)}")


def read_sizes(path: Path) -> dict[str, int]:
    """A file of `Name: 123 kB` lines, as /proc/meminfo is, in bytes; empty where it cannot be read."""
    try:
        rows = [line.split() for line in path.read_text("utf-8").splitlines()]
        return {row[0].rstrip(":"): int(row[1]) << 10 for row in rows if len(row) == 3 and row[2] == "kB"}
    except (OSError, ValueError):
        return {}
