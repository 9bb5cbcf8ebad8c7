"""How many threads are worth starting."""

from __future__ import annotations

import os
import platform
from pathlib import Path

from edge_spec.cache_file import CacheFile
from edge_spec.errors import UsageError

_CGROUP_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def usable_cores() -> int:
    """Physical cores that this process may use: its affinity, and its cgroup's share of processor time."""
    import psutil

    processors = usable_processors()
    return max(1, min(processors, psutil.cpu_count(logical=False) or processors))


def usable_processors() -> int:
    """The same in processors as the system counts them: where a core runs two threads, twice as many."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(allowed, _quota(allowed)))


def check_threads(threads: int | None) -> int:
    """`threads`, or `usable_cores()` for None; UsageError for none and for more than the machine has processors."""
    most = os.cpu_count() or 1
    if threads is None:
        return usable_cores()
    if not 1 <= threads <= most:
        raise UsageError(f"threads={threads}: from 1 to {most}, the processors of this machine")
    return threads


def processor_features() -> frozenset[str]:
    """The processor's extensions by their Linux names (avx2, avx512f, asimddp, ...).

    Where the system does not list them, what practically all machines of its kind have.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        lines = []
    for line in lines:
        name, _, listed = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return frozenset(listed.split())
    return frozenset({"avx2"} if platform.machine().lower() in ("x86_64", "amd64") else {"asimddp", "i8mm"})


class RecommendedThreads:
    """The numbers of threads that were found best on this machine, by processor and engine."""

    def __init__(self, cache_dir: Path) -> None:
        self._cache = CacheFile(cache_dir / "threads.json")

    def get(self, key: str) -> int | None:
        """The number for `key`, None where none was found, or more than the machine has now."""
        known = self._cache.get(key)
        return known if isinstance(known, int) and 1 <= known <= usable_processors() else None

    def put(self, key: str, threads: int) -> None:
        """Recommend `threads` from now on."""
        self._cache.put(key, threads)


def _quota(default: int) -> int:
    """Whole cores that the cgroup (version 2) grants; `default` where it sets no limit."""
    try:
        quota, period = _CGROUP_QUOTA.read_text("ascii").split()
        return max(1, int(quota) // int(period))
    except (OSError, ValueError):
        return default
