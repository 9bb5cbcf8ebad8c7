"""What the commands share: notes and progress on standard error, JSON on standard output, errors as exit codes."""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from edge_spec.errors import BackendMemoryError, EdgeSpecError, MemoryBudgetError, UsageError
from edge_spec.sizes import format_size
from edge_spec.types import Progress

FAILED = 1
BAD_USAGE = 2
DOES_NOT_FIT = 3
INTERRUPTED = 130
_PLAIN_EVERY_S = 5.0


@contextmanager
def error_boundary() -> Iterator[None]:
    """Turn an error into one line on standard error and an exit code; a traceback only with EDGE_SPEC_DEBUG set.

    Of the exceptions that are not ours, OSError (standard output on a full disk, say) and MemoryError are the system's;
    others are mistakes in the program, and pass with their traceback.
    """
    try:
        yield
    except (EdgeSpecError, OSError, MemoryError) as exc:
        if os.environ.get("EDGE_SPEC_DEBUG"):
            traceback.print_exc()
        if not isinstance(exc, BrokenPipeError):  # a reader that has seen enough
            reason = (
                f"not enough memory ({str(exc) or 'the system gives no more'})" if isinstance(exc, MemoryError) else exc
            )
            print(f"error: {reason}", file=sys.stderr)
        _discard_unwritten()
        sys.exit(exit_code(exc))
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


@contextmanager
def all_streams_open() -> Iterator[None]:
    """Within the block, standard streams that the caller has closed (None in Python) swallow all and give nothing."""
    modes = {"stdin": "r", "stdout": "w", "stderr": "w"}
    closed = [name for name in modes if getattr(sys, name) is None]
    with ExitStack() as stack:
        for name in closed:
            setattr(sys, name, stack.enter_context(Path(os.devnull).open(modes[name], encoding="utf-8")))
            stack.callback(setattr, sys, name, None)
        yield


def exit_code(error: BaseException) -> int:
    """What a command that ended in `error` exits with."""
    if isinstance(error, (MemoryBudgetError, BackendMemoryError)):
        return DOES_NOT_FIT
    return BAD_USAGE if isinstance(error, UsageError) else FAILED


def _discard_unwritten() -> None:
    """Let go of output that cannot be written, which Python would else try, and complain of, once more at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        null = os.open(os.devnull, os.O_WRONLY)
        with suppress(OSError, ValueError):
            os.dup2(null, sys.stdout.fileno())
        os.close(null)


def print_note(text: str) -> None:
    """Print a line for the user to standard error."""
    print(text, file=sys.stderr, flush=True)


def print_json(value: object) -> None:
    """Print one JSON value to standard output."""
    print(json.dumps(value, indent=2, ensure_ascii=False))


@contextmanager
def byte_progress(label: str, *, unit: str = "bytes") -> Iterator[tuple[Progress, Callable[[str], None]]]:
    """A callback that shows bytes done of bytes in all on standard error, and one that prints a note beside it.

    On a terminal it is a bar, which appears with the first bytes; elsewhere a line now and then. Another `unit` is
    counted as it is.
    """
    if sys.stderr.isatty():
        yield from _bar(label, unit)
    else:
        yield _plain_lines(label, unit), print_note


def _bar(label: str, unit: str) -> Iterator[tuple[Progress, Callable[[str], None]]]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )
    from rich.progress import Progress as Bar

    console = Console(stderr=True, highlight=False)
    bar = Bar(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        *([DownloadColumn(binary_units=True), TransferSpeedColumn()] if unit == "bytes" else [MofNCompleteColumn()]),
        TimeRemainingColumn(),
        console=console,
        redirect_stdout=False,
    )
    task = bar.add_task(label, total=None, visible=False)

    def update(done: int, total: int) -> None:
        # The first report may be what an earlier pull left: it must not count as this one's speed.
        if not bar.tasks[0].visible:
            bar.reset(task, total=total, completed=done, visible=True)
        bar.update(task, completed=done, total=total)

    def note(text: str) -> None:
        console.print(text, markup=False, soft_wrap=True)

    with bar:
        yield update, note


def _plain_lines(label: str, unit: str) -> Progress:
    last_s, complete = time.monotonic(), False

    def update(done: int, total: int) -> None:
        nonlocal last_s, complete
        now = time.monotonic()
        if not complete and (done == total or now - last_s >= _PLAIN_EVERY_S):
            last_s, complete = now, done == total
            counted = f"{format_size(done)} of {format_size(total)}" if unit == "bytes" else f"{done} of {total} {unit}"
            print_note(f"{label}: {counted} ({done / total:.0%})")

    return update
