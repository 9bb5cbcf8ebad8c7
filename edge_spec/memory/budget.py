"""How much memory this process may take: what the caller grants, and what the machine leaves.

The machine leaves (limit - current + file pages) of every control group above the process, the memory that is available
less a reserve for everybody else, and what the process's own limits leave.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from edge_spec.errors import UsageError
from edge_spec.memory.cgroup import PROC, limited_cgroups
from edge_spec.memory.process import Usage, process_memory
from edge_spec.sizes import format_size

RESERVE_SHARE, LEAST_RESERVE_BYTES, MOST_RESERVE_BYTES = 0.05, 128 << 20, 1 << 30
"""Of the machine's memory, what is left to the system and the other programs."""

_UNLIMITED = 1 << 62


class Counts(StrEnum):
    """What a bound counts."""

    HELD = "held"
    """Anonymous memory that was touched."""
    ALLOCATED = "allocated"
    """That, and what was allocated and never touched (RLIMIT_DATA)."""
    MAPPED = "mapped"
    """That, and mapped files (RLIMIT_AS)."""


@dataclass(frozen=True, slots=True)
class Bound:
    """Most bytes that the process may have in all, what it has already included, and who says so."""

    n_bytes: int
    source: str
    counts: Counts = Counts.HELD

    def __str__(self) -> str:
        return f"{format_size(self.n_bytes)} ({self.source})"


@dataclass(frozen=True, slots=True)
class Budget:
    """All bounds that hold at once; at least one of them counts what is held."""

    bounds: tuple[Bound, ...]

    @property
    def held(self) -> Bound:
        """The least bound on anonymous memory: what the process is kept within while it runs."""
        return min((bound for bound in self.bounds if bound.counts is Counts.HELD), key=lambda bound: bound.n_bytes)


def reserve_bytes(total_bytes: int) -> int:
    """What to leave to the others on a machine with `total_bytes`: 5 %, at least 128 MiB and at most 1 GiB."""
    return min(MOST_RESERVE_BYTES, max(LEAST_RESERVE_BYTES, int(total_bytes * RESERVE_SHARE)))


def find_budget(ram: str | int | None = None, *, usage: Usage | None = None, proc: Path = PROC) -> Budget:
    """What the caller grants (a size, bytes, or the name of a device; None: all there is) and the machine leaves.

    Raises UsageError for what is neither.
    """
    usage = usage or process_memory().read()
    bounds = [_available(usage, proc), *_in_groups(usage, proc), *_in_limits()]
    return Budget((*([] if ram is None else [granted(ram)]), *bounds))


def granted(ram: str | int) -> Bound:
    """The caller's own bound; UsageError for what is no size and no known device."""
    from edge_spec.memory.devices import parse_budget

    if isinstance(ram, str):
        n_bytes, device = parse_budget(ram)
        return Bound(n_bytes, f"what a {device.title} leaves to one program" if device else "asked for")
    if isinstance(ram, bool) or not isinstance(ram, int) or ram < 1:
        raise UsageError(f"ram={ram!r}: give a size like '3GiB', a number of bytes, or the name of a device")
    return Bound(ram, "asked for")


def _available(usage: Usage, proc: Path) -> Bound:
    available, total = available_memory(proc)
    reserve = reserve_bytes(total)
    source = f"available memory, less a reserve of {format_size(reserve)}"
    return Bound(usage.anonymous_bytes + max(0, available - reserve), source)


def available_memory(proc: Path = PROC) -> tuple[int, int]:
    """Bytes that the machine can still give without swapping, and all that it has."""
    sizes = read_sizes(proc / "meminfo")
    if "MemAvailable" in sizes and "MemTotal" in sizes:
        return sizes["MemAvailable"], sizes["MemTotal"]
    import psutil

    memory = psutil.virtual_memory()
    return int(memory.available), int(memory.total)


def _in_groups(usage: Usage, proc: Path) -> Iterator[Bound]:
    for group in limited_cgroups(proc) if sys.platform == "linux" else []:
        source = f"the control group {group.path}, limited to {format_size(group.limit_bytes)}"
        yield Bound(usage.anonymous_bytes + group.room_bytes, source)


def _in_limits() -> Iterator[Bound]:
    if sys.platform != "linux":
        return
    import resource

    for name, counts in (("RLIMIT_DATA", Counts.ALLOCATED), ("RLIMIT_AS", Counts.MAPPED)):
        limit, _ = resource.getrlimit(getattr(resource, name))
        if 0 <= limit < _UNLIMITED:
            yield Bound(limit, name, counts)


def read_sizes(path: Path) -> dict[str, int]:
    """A file of `Name: 123 kB` lines, as /proc/meminfo is, in bytes; empty where it cannot be read."""
    try:
        rows = [line.split() for line in path.read_text("utf-8").splitlines()]
        return {row[0].rstrip(":"): int(row[1]) << 10 for row in rows if len(row) == 3 and row[2] == "kB"}
    except (OSError, ValueError):
        return {}
