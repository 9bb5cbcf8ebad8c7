"""The benchmark's end of a contender's process."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from edge_spec.errors import BackendError
from edge_spec.worker_process import WorkerProcess
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
        arguments = ["-m", worker, name, json.dumps(asdict(settings))]
        self._process = WorkerProcess(name, arguments, folders=[_TOOLS])
        with self._sampled() as peaks:
            try:
                with self._named():
                    greeting = self._process.receive()
            except BaseException:
                self.close()
                raise
        self.peak_loading = peaks[0]
        self.load_s: float = greeting["load_s"]
        self.about: str = greeting["about"]

    def answer(self, prompt: str, max_tokens: int) -> Answer:
        """The contender's answer; ContenderError if it failed or died."""
        with self._sampled() as peaks, self._named():
            reply = self._process.ask(prompt=prompt, max_tokens=max_tokens)
        self.peak_answering = self.peak_answering.maximum(peaks[0])
        return Answer(**reply)

    def close(self) -> None:
        """End the process."""
        self._process.close()

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except BackendError as exc:
            raise ContenderError(f"{self.name}: {exc}") from exc

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
