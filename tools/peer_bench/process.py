"""The benchmark's end of a contender's process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from peer_bench.answer import Answer, Settings
from peer_bench.memory import Memory, read_memory

_SAMPLE_EVERY_S = 0.1
_TOOLS = Path(__file__).resolve().parents[1]


class ContenderError(Exception):
    """A contender could not be loaded, failed to answer, or died."""


class ContenderProcess:
    """One loaded contender. Between two requests it waits on its pipe and does nothing."""

    def __init__(self, name: str, settings: Settings, *, worker: str = "peer_bench.worker") -> None:
        """Start the process and wait until its models are loaded; ContenderError if they cannot be.

        `worker` is the module that is run.
        """
        self.name = name
        self.peak_loading = self.peak_answering = Memory()
        path = os.pathsep.join(filter(None, [str(_TOOLS), str(_TOOLS.parent), os.environ.get("PYTHONPATH")]))
        self._process = subprocess.Popen(
            [sys.executable, "-m", worker, name, json.dumps(asdict(settings))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            encoding="utf-8",
            env=os.environ | {"PYTHONPATH": path},
        )
        with self._sampled() as peaks:
            try:
                greeting = self._receive()
            except BaseException:
                self.close()
                raise
        self.peak_loading = peaks[0]
        self.load_s: float = greeting["load_s"]
        self.about: str = greeting["about"]

    def answer(self, prompt: str, max_tokens: int) -> Answer:
        """The contender's answer; ContenderError if it failed or died."""
        assert self._process.stdin is not None
        with self._sampled() as peaks:
            try:
                self._process.stdin.write(json.dumps({"prompt": prompt, "max_tokens": max_tokens}) + "\n")
                self._process.stdin.flush()
            except BrokenPipeError as exc:
                raise ContenderError(f"{self.name} has ended") from exc
            reply = self._receive()
        self.peak_answering = self.peak_answering.maximum(peaks[0])
        return Answer(**reply)

    def close(self) -> None:
        """End the process: its input ends, it ends."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):  # a request that a dead process never read
            self._process.stdin.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def _receive(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise ContenderError(f"{self.name} ended without an answer (exit code {self._process.wait()})")
        message: dict[str, Any] = json.loads(line)
        if "error" in message:
            raise ContenderError(f"{self.name}: {message['error']}")
        return message

    @contextmanager
    def _sampled(self) -> Iterator[list[Memory]]:
        """Watch the process's memory for the length of the block; the list's only element is the peak so far."""
        peaks = [read_memory(self._process.pid)]
        done = threading.Event()

        def watch() -> None:
            while not done.wait(_SAMPLE_EVERY_S):
                peaks[0] = peaks[0].maximum(read_memory(self._process.pid))

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            yield peaks
        finally:
            done.set()
            watcher.join()
            peaks[0] = peaks[0].maximum(read_memory(self._process.pid))
