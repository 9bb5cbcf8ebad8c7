"""Progress of exporting, loading and reading a long prompt, on standard error."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress as Bar
    from rich.progress import TaskID

_LONG_PROMPT_TOKENS = 512
_PLAIN_EVERY_S = 10.0


class ProgressDisplay:
    """A bar that vanishes when the work is done; where standard error is no terminal, a plain line now and then.

    A context manager that can be entered again: leaving it takes the bar away. Its methods are the callbacks that
    `Engine.load` and `Engine.stream` take, and show the bar by themselves.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._bar: Bar | None = None
        self._task: TaskID | None = None
        self._stage: str | None = None
        self._last_line_s = clock()

    def __enter__(self) -> ProgressDisplay:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.clear()

    def stage(self, stage: str, done: int, total: int) -> None:
        """`Engine.load`'s callback: `done` of `total` units of the named stage."""
        if sys.stderr.isatty():
            self._draw(stage, done, total)
        else:
            self._print(stage, done, total)

    def prefill(self, done: int, total: int) -> bool:
        """`Engine.stream`'s callback while a prompt is read, in tokens; short prompts show nothing. Never stops it."""
        if total >= _LONG_PROMPT_TOKENS:
            self.stage("reading the prompt", done, total)
        if done >= total:
            self.clear()
        return True

    def clear(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()
        self._bar = self._task = self._stage = None

    def _draw(self, stage: str, done: int, total: int) -> None:
        if self._bar is None or self._task is None:
            self._bar, self._task = _new_bar(stage)
        elif stage != self._stage:
            self._bar.reset(self._task, description=stage)
        self._stage = stage
        self._bar.update(self._task, completed=done, total=total if total > 1 else None)

    def _print(self, stage: str, done: int, total: int) -> None:
        # An export takes a minute, so it is announced; everything else speaks up only if it turns out to be slow.
        announce = stage != self._stage and stage.startswith("export")
        self._stage = stage
        now = self._clock()
        if announce or (now - self._last_line_s >= _PLAIN_EVERY_S and done < total):
            self._last_line_s = now
            share = "" if announce or total <= 1 else f" {done / total:.0%}"
            print(f"{stage}{share} ...", file=sys.stderr, flush=True)


def _new_bar(stage: str) -> tuple[Bar, TaskID]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    bar = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        redirect_stdout=False,
        redirect_stderr=False,
    )
    task = bar.add_task(stage, total=None)
    bar.start()
    return bar, task
