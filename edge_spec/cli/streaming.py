"""Shows an answer while it is written, and lets Ctrl-C stop it."""

from __future__ import annotations

import io
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import TYPE_CHECKING

from edge_spec.types import GenerationResult

if TYPE_CHECKING:
    from edge_spec.cli.progress import ProgressDisplay
    from edge_spec.generation import Stream

_PATIENT_PRESSES = 2
"""Presses of Ctrl-C that ask politely; a nervous double press must not lose the text and the figures."""

# On a terminal a model's text must not move the cursor, ring or recolour: C0 but tab and newline, DEL, C1.
_CONTROLS = dict.fromkeys(code for code in [*range(0x20), *range(0x7F, 0xA0)] if chr(code) not in "\t\n")


@dataclass(frozen=True, slots=True)
class Outcome:
    """How following a stream ended."""

    result: GenerationResult
    interrupted: bool
    """Ctrl-C was pressed."""


class AnswerText:
    """Standard output for one answer: flushed piece by piece; leaving the context closes the last line."""

    def __init__(self) -> None:
        if isinstance(sys.stdout, io.TextIOWrapper):  # A character that the locale lacks must not end the answer.
            sys.stdout.reconfigure(errors="replace")
        self._safe = sys.stdout.isatty()
        self._last = "\n"

    def __enter__(self) -> AnswerText:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._last != "\n" and not isinstance(exc, BrokenPipeError):
            self.write("\n")

    def write(self, text: str) -> None:
        """Show `text` now. Raises BrokenPipeError if the reader has gone."""
        shown = text.translate(_CONTROLS) if self._safe else text
        if shown:
            sys.stdout.write(shown)
            sys.stdout.flush()
            self._last = shown[-1]


def show(stream: Stream, progress: ProgressDisplay) -> Outcome:
    """Print a stream's text to standard output; the first of it takes the progress bar away. Else like `follow`."""
    with progress, AnswerText() as answer:

        def write(text: str) -> None:
            if text:
                progress.clear()
                answer.write(text)

        return follow(stream, write)


def follow(stream: Stream, write: Callable[[str], None]) -> Outcome:
    """Hand every piece's text to `write` until the stream ends or Ctrl-C ends it.

    The stream is closed if `write` raises; the error goes on to the caller.
    """
    with _cancel_on_interrupt(stream) as presses:
        try:
            for piece in stream:
                write(piece.text)
        finally:
            stream.close()
    return Outcome(stream.result, interrupted=presses.count > 0)


class _Presses:
    count = 0


@contextmanager
def _cancel_on_interrupt(stream: Stream) -> Iterator[_Presses]:
    """Within the block Ctrl-C cancels `stream`; pressed again and again it raises KeyboardInterrupt after all."""
    presses = _Presses()

    def on_interrupt(_signal: int, _frame: FrameType | None) -> None:
        presses.count += 1
        stream.cancel()
        if presses.count > _PATIENT_PRESSES:
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield presses  # Python lets only the main thread handle signals.
        return
    before = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield presses
    finally:
        signal.signal(signal.SIGINT, before)
