"""Threads that go through the steps of a pass together."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor, wait
from ctypes import Array, byref
from threading import Barrier
from typing import Any

from edge_spec.kernels.library import Pass, Step, Team


class Threads:
    """The caller's thread and `n - 1` others, which are there from the start. RuntimeError where they cannot be had."""

    def __init__(self, library: Any, n: int) -> None:
        self._library = library
        self._team = Team(n_threads=n)
        self._workers = _started(n - 1) if n > 1 else None

    def run(self, steps: Array[Step], about: Pass) -> None:
        """Go through the steps of one pass. What interrupts one thread ends the pass for all of them."""
        running: list[Future[None]] = []
        try:
            if self._workers is not None:
                running.extend(
                    self._workers.submit(self._take_part, steps, about) for _ in range(self._team.n_threads - 1)
                )
            self._take_part(steps, about)
            for other in running:
                other.result()
        except BaseException:
            self._team.abandoned = 1
            try:
                if self._workers is not None:
                    wait(other for other in running if not other.cancel())
            finally:
                self._team = Team(n_threads=self._team.n_threads)
            raise

    def close(self) -> None:
        """End the other threads."""
        if self._workers is not None:
            self._workers.shutdown()

    def _take_part(self, steps: Array[Step], about: Pass) -> None:
        """The interpreter's lock is free in the meantime."""
        self._library.edge_spec_run(byref(self._team), steps, len(steps), byref(about))


def _started(threads: int) -> ThreadPoolExecutor:
    """Threads that are there, not ones that may fail to start in a pass."""
    pool = ThreadPoolExecutor(threads, "edge_spec")
    together = Barrier(threads + 1)
    try:
        for _ in range(threads):
            pool.submit(together.wait)
        together.wait()
    except BaseException:
        together.abort()
        pool.shutdown()
        raise
    return pool
