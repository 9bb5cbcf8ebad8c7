"""How far one decode has come."""

from __future__ import annotations

from edge_spec.errors import GenerationCancelled
from edge_spec.types import Progress


class Reading:
    """Counts what one decode reads, `chunk` tokens at a time, and tells who wants to know."""

    def __init__(self, on_progress: Progress | None, total: int, chunk: int) -> None:
        self.chunk = chunk
        self._on_progress = on_progress
        self._done = 0
        self._total = total

    def correct(self, left: int) -> None:
        """What is left to read turned out to be this much."""
        self._total = self._done + left

    def report(self, count: int) -> None:
        """`count` more tokens were read. Raises GenerationCancelled if that was enough."""
        self._done += count
        self._total = max(self._total, self._done)
        if self._on_progress is not None and self._on_progress(self._done, self._total) is False:
            raise GenerationCancelled(f"cancelled after {self._done} of {self._total} tokens were read")
