"""A model in a process of its own, asked by JSON lines: the asking end (`WorkerProcess`) and the process's (`serve`).

Between two requests the process waits on its pipe, so that its threads take nothing from others'; it ends when its
input does, so it does not outlive whoever asks.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from edge_spec.errors import BackendError, EdgeSpecError

_ROOT = Path(__file__).resolve().parents[1]
_END_S = 30


class WorkerProcess:
    """The asking end. `greeting` is what the process said of itself once it was ready."""

    def __init__(self, name: str, arguments: Sequence[str], *, folders: Sequence[Path] = ()) -> None:
        """Start Python with these arguments; modules come from `folders` too. Wait for the greeting with `receive`."""
        self._name = name
        path = os.pathsep.join(filter(None, [*map(str, folders), str(_ROOT), os.environ.get("PYTHONPATH")]))
        self._process = subprocess.Popen(
            [sys.executable, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            encoding="utf-8",
            env=os.environ | {"PYTHONPATH": path},
        )

    @property
    def pid(self) -> int:
        """The process's number."""
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """What it ended with; None while it runs."""
        return self._process.poll()

    def ask(self, **request: object) -> Any:
        """What it replies. BackendError with its own words if it failed, or that it has ended."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError as exc:
            raise self._ended() from exc
        return self.receive()

    def receive(self) -> Any:
        """The next reply, the greeting first; raises what `ask` raises."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise self._ended()
        message = json.loads(line)
        if "error" in message:
            raise BackendError(message["error"])
        return message["reply"]

    def close(self) -> None:
        """End the process: its input ends, it ends."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):  # a request that a dead process never read
            self._process.stdin.close()
        try:
            self._process.wait(timeout=_END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def _ended(self) -> BackendError:
        return BackendError(f"the process of {self._name} ended with the code {self._process.wait()}")


def serve(start: Callable[[], tuple[object, Callable[..., object]]]) -> None:
    """Run the process: `start` loads, and gives the greeting and what is called with each request's values.

    What fails is told, and the next request may do better; Ctrl-C is for whoever asks to speak of.
    """
    replies = _private_output()
    with suppress(KeyboardInterrupt):
        try:
            greeting, do = start()
        except Exception as exc:
            _send(replies, {"error": _reason(exc)})
            return
        _send(replies, {"reply": greeting})
        for line in sys.stdin:
            try:
                reply = {"reply": do(**json.loads(line))}
            except Exception as exc:
                reply = {"error": _reason(exc)}
            _send(replies, reply)


def _reason(exc: Exception) -> str:
    return str(exc) if isinstance(exc, EdgeSpecError) else f"{type(exc).__name__}: {exc}"


def _private_output() -> TextIO:
    """The pipe to whoever asks, out of reach of libraries that print: their output goes to standard error."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return replies


def _send(replies: TextIO, message: dict[str, Any]) -> None:
    replies.write(json.dumps(message) + "\n")
    replies.flush()
