"""Whether memory is short, for this process or for the machine: one reading of all that tells."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Protocol

from edge_spec.memory.budget import available_memory, reserve_bytes
from edge_spec.memory.cgroup import PROC, count_limit_hits, limited_cgroups, pressure_file
from edge_spec.memory.process import ProcessMemory, process_memory
from edge_spec.sizes import format_size


class Level(IntEnum):
    """How short memory is."""

    CALM = 0
    """Below every mark at which something is given back."""
    EASING = 1
    """Between the two marks: what was begun goes on, nothing new is."""
    HIGH = 2
    """Something has to be given back now."""


@dataclass(frozen=True, slots=True)
class Reading:
    """How short memory is, and what says so."""

    level: Level
    reason: str = ""


class Signal(Protocol):
    """One thing that tells of a shortage."""

    def read(self) -> Reading:
        """How things stand now."""
        ...


@dataclass(frozen=True, slots=True)
class Marks:
    """Bytes left at which memory is short (`low`), and at which it no longer is (`enough`)."""

    low_bytes: int
    enough_bytes: int

    def level(self, left_bytes: int) -> Level:
        """The level with so much left."""
        if left_bytes < self.low_bytes:
            return Level.HIGH
        return Level.EASING if left_bytes < self.enough_bytes else Level.CALM


class OwnMemory:
    """What the process holds against its budget. Cheap: read it often.

    The marks are as wide as a pass may grow before it is looked at again: 1 % of the budget, at least 16 MiB.
    """

    SHARE, LEAST_BYTES = 0.01, 16 << 20

    def __init__(self, budget_bytes: int, memory: ProcessMemory | None = None) -> None:
        self._budget_bytes = budget_bytes
        self._memory = memory or process_memory()
        low = max(self.LEAST_BYTES, int(budget_bytes * self.SHARE))
        self._marks = Marks(low, 2 * low)

    def read(self) -> Reading:
        """See `Signal.read`."""
        held = self._memory.read().anonymous_bytes
        level = self._marks.level(self._budget_bytes - held)
        return (
            Reading(level, f"{format_size(held)} of {format_size(self._budget_bytes)} are in use") if level else _CALM
        )


class GroupMemory:
    """The control groups above the process: what is left in them, and how often they ran into their limits."""

    SHARE, LEAST_BYTES = 0.02, 16 << 20

    def __init__(self, proc: Path = PROC) -> None:
        self._proc = proc
        self._hits = count_limit_hits(proc)

    def read(self) -> Reading:
        """See `Signal.read`."""
        worst = _CALM
        for group in limited_cgroups(self._proc):
            low = max(self.LEAST_BYTES, int(group.limit_bytes * self.SHARE))
            level = Marks(low, 2 * low).level(group.room_bytes)
            if level > worst.level:
                left, limit = format_size(group.room_bytes), format_size(group.limit_bytes)
                worst = Reading(level, f"the control group {group.path} has {left} of {limit} left")
        before, self._hits = self._hits, count_limit_hits(self._proc)
        # Alone it says little: file pages that make room for others count too.
        if self._hits > before and worst.level is Level.EASING:
            return Reading(Level.HIGH, f"{worst.reason}, and ran into it")
        return worst


class AvailableMemory:
    """What the whole machine has left, and whether its programs wait for memory already (Linux: PSI).

    Below a quarter of the reserve that a plan leaves it is short. Waiting counts while less than the whole reserve is
    left, or where it is our own control group that waits: the stalls of others behind their limits are none of ours.
    """

    STALLED_PERCENT, RELIEVED_PERCENT = 10.0, 5.0
    """Share of the last 10 s in which some task waited for memory (`some avg10`; the kernel's accounting/psi.rst)."""

    def __init__(self, proc: Path = PROC) -> None:
        self._proc = proc

    def read(self) -> Reading:
        """See `Signal.read`."""
        available, total = available_memory(self._proc)
        reserve = reserve_bytes(total)
        level = Marks(reserve // 4, reserve // 2).level(available)
        if level is Level.HIGH:
            return Reading(level, f"{format_size(available)} are left on the whole machine")
        stalls = [stalled_percent(own)] if (own := pressure_file(self._proc)) else []
        if available < reserve:
            stalls.append(stalled_percent(self._proc / "pressure/memory"))
        percent = max(stalls, default=0.0)
        if percent >= self.STALLED_PERCENT:
            return Reading(Level.HIGH, f"programs waited for memory in {percent:.0f} % of the last 10 s")
        if level or percent >= self.RELIEVED_PERCENT:
            return Reading(Level.EASING, f"{format_size(available)} are left on the whole machine")
        return _CALM


class MacPressure:
    """What macOS says of its memory: 1 normal, 2 warn, 4 critical (`kern.memorystatus_vm_pressure_level`)."""

    def __init__(self, read_level: Callable[[], int] | None = None) -> None:
        self._read_level = read_level or _mac_level

    def read(self) -> Reading:
        """See `Signal.read`."""
        level = self._read_level()
        if level >= 4:
            return Reading(Level.HIGH, "macOS says that memory is critically short")
        return Reading(Level.EASING, "macOS says that memory is short") if level >= 2 else _CALM


def machine_signals() -> list[Signal]:
    """The signals of this platform besides the process's own memory."""
    if sys.platform == "linux":
        return [GroupMemory(), AvailableMemory()]
    return [AvailableMemory(), MacPressure()] if sys.platform == "darwin" else [AvailableMemory()]


def stalled_percent(file: Path) -> float:
    """`some avg10` of a PSI file; 0 where the kernel keeps no such account."""
    try:
        fields = file.read_text("ascii").split("\n", 1)[0].split()
        return float(dict(field.split("=", 1) for field in fields[1:])["avg10"])
    except (OSError, ValueError, KeyError):
        return 0.0


def _mac_level() -> int:
    import ctypes

    level = ctypes.c_int(0)
    size = ctypes.c_size_t(ctypes.sizeof(level))
    name = b"kern.memorystatus_vm_pressure_level"
    failed = ctypes.CDLL(None).sysctlbyname(name, ctypes.byref(level), ctypes.byref(size), None, ctypes.c_size_t(0))
    return 1 if failed else level.value


_CALM = Reading(Level.CALM)
