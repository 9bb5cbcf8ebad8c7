"""Resident memory of a process, split into what must stay in RAM and what can be read again from its file (Linux)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

_FIELDS = {"RssAnon": "anonymous_bytes", "RssFile": "mapped_bytes", "VmHWM": "peak_rss_bytes"}


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes; zero where the system does not tell. `peak_rss_bytes` is the kernel's own high-water mark."""

    anonymous_bytes: int = 0
    mapped_bytes: int = 0
    peak_rss_bytes: int = 0

    def maximum(self, other: Memory) -> Memory:
        """The larger of each: peaks of the parts, which may not have been at the same moment."""
        return Memory(
            max(self.anonymous_bytes, other.anonymous_bytes),
            max(self.mapped_bytes, other.mapped_bytes),
            max(self.peak_rss_bytes, other.peak_rss_bytes),
        )


def read_memory(pid: int) -> Memory:
    """The memory of process `pid` and its children now, from /proc; all zero if it has ended or there is no /proc."""
    family = [_read(member) for member in (pid, *_children(pid))]
    return Memory(*(sum(getattr(memory, name) for memory in family) for name in _FIELDS.values()))


def _children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def _read(pid: int) -> Memory:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return Memory()
    found = {}
    for line in status.splitlines():
        name, _, value = line.partition(":")
        if name in _FIELDS:
            found[_FIELDS[name]] = int(value.split()[0]) * 1024
    return Memory(**found)
