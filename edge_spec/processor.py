"""The processor at hand: its name and its features, by which what was measured or compiled is kept."""

from __future__ import annotations

import hashlib
import platform
from pathlib import Path


def cpu_key() -> str:
    """The processor, with a sum over its features: kernels are chosen by them."""
    return f"{platform.machine()} {_cpu_model()}"


def processor_name() -> str:
    """What the system calls its processor."""
    return _cpu_facts().get("model name") or platform.processor() or platform.machine()


def _cpu_model() -> str:
    told = list(_cpu_facts().values())
    if not told:
        return platform.processor()
    return f"{told[0]} {hashlib.sha256(' '.join(told).encode()).hexdigest()[:8]}"


def _cpu_facts() -> dict[str, str]:
    """Name and features of the first processor, in the order that the system tells them; empty where it does not."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").split("\n\n", 1)[0].splitlines()
    except OSError:
        return {}
    wanted = ("model name", "flags", "Features", "CPU part")
    pairs = (line.split(":", 1) for line in lines if ":" in line)
    return {name.strip(): value.strip() for name, value in pairs if name.strip() in wanted}
