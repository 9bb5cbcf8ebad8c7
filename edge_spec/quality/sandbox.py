"""Run a program that nobody has read: a process of its own, with walls around it.

Limits on processor time, memory, the size and number of files; a folder of its own that is thrown away; no
environment, no site packages, no terminal. On Linux also no network (namespaces) and no writing outside its folder
(Landlock), where the kernel grants them to an ordinary process: `Verdict.walls` says which stood. What such a program
could still do is read files, with nowhere to send them to.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from edge_spec.errors import UsageError

_JAIL = Path(__file__).with_name("jail.py")
_MAX_OUTPUT = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a program may use. `wall_s` ends one that sleeps."""

    cpu_s: int = 10
    wall_s: float = 60.0
    memory_bytes: int = 1 << 30
    file_bytes: int = 1 << 20


@dataclass(frozen=True, slots=True)
class Verdict:
    """How a program ended. `reason`: the last line that it wrote, or what stopped it; `walls`: those that stood."""

    passed: bool
    reason: str
    walls: tuple[str, ...]


def run(source: str, limits: Limits | None = None) -> Verdict:
    """Run Python `source` to its end; it passes if it ends without an exception, a limit or an early exit.

    Raises UsageError on systems without resource limits (Windows).
    """
    limits = limits or Limits()
    if os.name != "posix":
        raise UsageError("programs of a model are run on Linux and macOS only: there are no resource limits here")
    with tempfile.TemporaryDirectory(prefix="edge-spec-jail-") as folder:
        program = Path(folder) / "program.py"
        # A program that calls exit() in the middle has not passed: it has to reach its last line.
        done = f"passed-{os.urandom(16).hex()}"
        program.write_text(f"{source}\nprint({done!r})\n", "utf-8")
        command = [sys.executable, "-I", "-S", "-B", str(_JAIL), folder, str(program)]
        command += [str(limits.cpu_s), str(limits.memory_bytes), str(limits.file_bytes)]
        code, text = _run(command, folder, limits.wall_s)
    lines = text.splitlines()
    walls = tuple(lines.pop(0).removeprefix("walls:").split()) if lines and lines[0].startswith("walls:") else ()
    passed = code == 0 and bool(lines) and lines[-1] == done
    return Verdict(passed, "" if passed else _reason(code, lines), walls)


def _run(command: list[str], folder: str, wall_s: float) -> tuple[int | None, str]:
    """Exit code (None: out of time) and what was written, its middle cut out where it is long."""
    environment: Mapping[str, str] = {"HOME": folder, "TMPDIR": folder, "LC_ALL": "C.UTF-8"}
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        code: int | None
        try:
            code = process.wait(wall_s)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            # Its children too, whether it has ended or not.
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        output.seek(0)
        head = output.read(_MAX_OUTPUT)
        size = output.seek(0, os.SEEK_END)
        output.seek(max(len(head), size - _MAX_OUTPUT))
        return code, (head + output.read()).decode("utf-8", "replace")


def _reason(code: int | None, lines: list[str]) -> str:
    if code is None:
        return "took too long"
    if code in (-signal.SIGXCPU, -signal.SIGKILL):
        return "used up its processor time"
    if code < 0:
        return f"ended by {signal.Signals(-code).name}"
    return lines[-1][:200] if lines else f"ended with code {code} before its last line"
