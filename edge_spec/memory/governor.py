"""Watches memory while text is written, and gives some back, one measure after the other, before the system takes it.

A ladder of rungs, mildest first: each gives something back or has nothing left to give. The last is to stop with the
text so far. Whatever is done is a note.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import monotonic

from edge_spec.memory.pressure import Level, Reading, Signal
from edge_spec.types import FinishReason

OWN_EVERY_S, MACHINE_EVERY_S = 0.05, 1.0
"""Seconds between two readings of the process's memory (about 5 us), and of the machine's (about 0.2 ms)."""
SETTLE_S = 2.0
"""What was given back shows at once in the process, and after so long in the machine's figures."""

Rung = Callable[[], str | None]
"""Gives memory back; returns what was done, for the user, or None where there was nothing to give."""


class Governor:
    """Steps in between two steps of a generation, when memory is short; see `decoding.supervisor`.

    `own` tells of the process, `machine` of all around it. Acts when a signal is HIGH, and goes on, rung by rung, until
    none is above EASING's mark: so it does not act twice for the same shortage, nor for one that swings about a mark.
    It stops the generation only while memory is short right then; `on_stop` then makes room for the next one.
    """

    def __init__(
        self,
        own: Signal,
        machine: Sequence[Signal],
        rungs: Sequence[Rung],
        *,
        on_stop: Rung = lambda: None,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self._own = own
        self._machine = machine
        self._rungs = rungs
        self._on_stop = on_stop
        self._clock = clock
        self._own_at = self._machine_at = self._settled_at = float("-inf")
        self._around = Reading(Level.CALM)
        self._acting = False
        """Something was given back, and memory is not yet what it should be."""
        self._due: Reading | None = None
        self._stopped: str | None = None
        self._measures: list[str] = []
        self._done: list[str] = []

    @property
    def notes(self) -> list[str]:
        """Every measure so far, since they last, and why the generation was stopped, if it was."""
        return [*self._measures, self._stopped] if self._stopped else list(self._measures)

    @property
    def measures(self) -> list[str]:
        """What was done in the generation that runs, or ran last."""
        return list(self._done)

    def begin(self) -> None:
        """A new generation begins."""
        self._stopped = None
        self._done = []

    def watch(self, own: Signal) -> None:
        """Read this of the process from now on."""
        self._own = own
        self._own_at = float("-inf")

    def is_due(self) -> bool:
        """Whether to step in. Asked at every step, and looks only now and then."""
        if self._due is None:
            self._look()
        return self._due is not None

    def step_in(self, failure: BaseException | None = None) -> FinishReason | None:
        """Give something back; MEMORY if there is nothing left to give. `failure`: the backend got no memory."""
        reading, self._due = self._due, None
        reason = f"the backend got no more memory ({failure})" if failure else reading.reason if reading else ""
        for rung in self._rungs:
            if (done := rung()) is not None:
                self._note(done, f"because {reason}")
                self._acting = True
                self._settled_at = self._clock() + SETTLE_S
                self._around = Reading(Level.CALM)  # until it is looked at again
                return None
        self._acting = False
        if failure is None and reading is not None and reading.level is not Level.HIGH:
            return None  # nothing left to give, and no need to end the answer
        self._stopped = f"memory: stopped, because {reason} and there is nothing left to give back"
        if (done := self._on_stop()) is not None:
            self._note(done, "for what comes next")
        return FinishReason.MEMORY

    def _note(self, done: str, reason: str) -> None:
        self._done.append(done)
        self._measures.append(f"memory: {done}, {reason}")

    def _look(self) -> None:
        now = self._clock()
        if now - self._own_at < OWN_EVERY_S:
            return
        self._own_at = now
        if now - self._machine_at >= MACHINE_EVERY_S and now >= self._settled_at:
            self._machine_at = now
            self._around = _worst([signal.read() for signal in self._machine])
        worst = _worst([self._own.read(), self._around])
        if worst.level is Level.CALM:
            self._acting = False
        elif worst.level is Level.HIGH or self._acting:
            self._due = worst


def _worst(readings: Sequence[Reading]) -> Reading:
    return max(readings, key=lambda reading: reading.level, default=Reading(Level.CALM))
