"""Run a cell in a fresh process and watch its memory from outside."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from memory_bench.cell import Cell
from memory_bench.proc import Memory, read_memory, resident_by_kind

_SAMPLE_EVERY_S = 0.002
_TOOLS = Path(__file__).resolve().parents[1]


@dataclass(slots=True)
class Measured:
    """What a cell's process did and held. `stages`: the peak of each stage, by its name."""

    stages: dict[str, Memory] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    """What the worker told of its last stage."""
    resident: dict[str, int] = field(default_factory=dict)
    """Resident bytes by kind at the end of the generation."""
    exit_code: int = 0
    error: str = ""
    """The end of standard error, where the process did not end well."""

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> Measured:
        """What `dataclasses.asdict` made of one."""
        stages = {name: Memory(**stage) for name, stage in found["stages"].items()}
        return cls(**{**found, "stages": stages})

    @property
    def peak(self) -> Memory:
        """The peak of all stages."""
        peak = Memory()
        for stage in self.stages.values():
            peak = peak.maximum(stage)
        return peak

    @property
    def peak_anonymous_bytes(self) -> int:
        """The most anonymous memory of any stage."""
        return max((stage.peak_anonymous_bytes for stage in self.stages.values()), default=0)

    @property
    def finished(self) -> bool:
        """Whether it wrote its text."""
        return self.facts.get("stage") == "generated" and self.exit_code == 0


def measure(cell: Cell, *, prefix: Sequence[str] = (), python: str = sys.executable) -> Measured:
    """Run a cell to its end with the interpreter `python`. `prefix`: a command that runs the rest of its arguments,
    with limits for instance."""
    path = os.pathsep.join(filter(None, [str(_TOOLS), str(_TOOLS.parent), os.environ.get("PYTHONPATH")]))
    process = subprocess.Popen(
        [*prefix, python, "-m", "memory_bench.worker", json.dumps(asdict(cell))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        errors="replace",
        env=os.environ | {"PYTHONPATH": path},
    )
    watcher = _Watcher(process.pid)
    complaints: list[str] = []
    listener = threading.Thread(target=lambda: complaints.extend(process.stderr or ()), daemon=True)
    listener.start()
    found = Measured()
    try:
        _follow(process, watcher, found)
    finally:
        watcher.stop()
        if process.poll() is None:
            process.kill()
        found.exit_code = process.wait()
        listener.join()
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream is not None:
                stream.close()
    if found.exit_code or not found.facts:
        found.error = "".join(complaints)[-2000:]
    return found


def _follow(process: subprocess.Popen[str], watcher: _Watcher, found: Measured) -> None:
    assert process.stdin is not None
    assert process.stdout is not None
    for line in process.stdout:
        found.facts = json.loads(line)
        stage = str(found.facts["stage"])
        found.stages[stage] = watcher.take().maximum(Memory(**found.facts.pop("peak")))
        if stage == "generated":
            found.resident = resident_by_kind(process.pid)
        process.stdin.write("\n")
        process.stdin.flush()
    process.wait()


class _Watcher:
    """Samples a process from a thread of its own."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._peak = Memory()
        self._lock = threading.Lock()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def take(self) -> Memory:
        """The peak since the last call."""
        with self._lock:
            peak, self._peak = self._peak, Memory()
        return peak

    def stop(self) -> None:
        """End the thread."""
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(_SAMPLE_EVERY_S):
            now = read_memory(self._pid)
            if now is None:
                return
            with self._lock:
                self._peak = self._peak.maximum(now)
