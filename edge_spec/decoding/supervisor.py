"""What may step in between two steps of a generation: the governor of memory does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from edge_spec.errors import BackendMemoryError, GenerationCancelled
from edge_spec.types import FinishReason, Progress


class Supervisor(Protocol):
    """Watches a generation. It acts only where no pass is running, so it may close, resize and forget what it likes."""

    def is_due(self) -> bool:
        """Whether it wants to step in. Asked at every step and every chunk of a prompt: cheap."""
        ...

    def step_in(self, failure: BaseException | None = None) -> FinishReason | None:
        """Act. None: the generation goes on, with the step that was interrupted; else it ends here.

        `failure`: a pass got no memory from the system.
        """
        ...


class Unsupervised(Supervisor):
    """Never steps in; a want of memory is the caller's."""

    def is_due(self) -> bool:
        """Never."""
        return False

    def step_in(self, failure: BaseException | None = None) -> FinishReason | None:
        """Passes the failure on."""
        if failure is not None:
            raise failure
        return None


class Interruptions:
    """Who interrupts a pass: the caller, which ends the generation, or the supervisor, after which it goes on."""

    def __init__(self, cancelled: Callable[[], bool], on_progress: Progress | None, supervisor: Supervisor) -> None:
        self._cancelled = cancelled
        self._on_progress = on_progress
        self._supervisor = supervisor
        self._refused = False
        """The caller's progress callback returned False."""

    def wanted(self) -> bool:
        """Whether the pass that is running, or about to, should end."""
        return self._cancelled() or self._supervisor.is_due()

    def watch(self, *, is_prompt: bool) -> Progress:
        """A progress callback for a pass, which asks to stop once anybody wants it; of a prompt the caller is told."""
        on_progress = self._on_progress if is_prompt else None

        def progress(done: int, total: int) -> bool:
            if on_progress is not None and on_progress(done, total) is False:
                self._refused = True
            # After the last chunk there is nothing to interrupt, and what was read would be lost.
            return not (self._refused or self._cancelled() or (done < total and self._supervisor.is_due()))

        return progress

    def settle(self, interruption: BaseException) -> FinishReason | None:
        """What becomes of the generation after `interruption`: None if the step is to be tried again."""
        if not isinstance(interruption, GenerationCancelled):
            return self._supervisor.step_in(interruption)
        if self._refused or self._cancelled() or not self._supervisor.is_due():
            return FinishReason.CANCELLED
        return self._supervisor.step_in()


MEMORY_FAILURES = (BackendMemoryError, MemoryError)
"""A want of memory, by whichever name."""
