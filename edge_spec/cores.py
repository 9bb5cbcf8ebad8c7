"""How many threads are worth starting."""

from __future__ import annotations

import os
from pathlib import Path

from edge_spec.errors import UsageError

_CGROUP_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def usable_cores() -> int:
    """Physical cores that this process may use: its affinity, and its cgroup's share of processor time."""
    import psutil

    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(allowed, psutil.cpu_count(logical=False) or allowed, _quota(allowed)))


def check_threads(threads: int | None) -> int:
    """`threads`, or `usable_cores()` for None; UsageError for none and for more than the machine has processors."""
    most = os.cpu_count() or 1
    if threads is None:
        return usable_cores()
    if not 1 <= threads <= most:
        raise UsageError(f"threads={threads}: from 1 to {most}, the processors of this machine")
    return threads


def _quota(default: int) -> int:
    """Whole cores that the cgroup (version 2) grants; `default` where it sets no limit."""
    try:
        quota, period = _CGROUP_QUOTA.read_text("ascii").split()
        return max(1, int(quota) // int(period))
    except (OSError, ValueError):
        return default
