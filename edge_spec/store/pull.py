"""Fetching one model: its sources in order, disk space first, verified before it gets its name."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from edge_spec.errors import DownloadError, IntegrityError, StorageError
from edge_spec.sizes import format_size
from edge_spec.store.manifest import Weights
from edge_spec.store.partial import Partial, Source, SourceError, WrongBytesError
from edge_spec.types import Progress

Note = Callable[[str], None]
"""Called with a line for the user: a source that failed, a wait, a verification."""

_MARGIN_BYTES = 16 << 20


def fetch(weights: Weights, folder: Path, *, progress: Progress | None, note: Note) -> Path:
    """Bring `weights` into `folder` from the first source that delivers it, and return the file's path.

    An interrupted fetch is continued. Raises StorageError if there is too little disk; DownloadError if the callback
    asks to stop or no source delivers; IntegrityError if none does and one of them had other bytes.
    """
    temporary, final = partial_path(weights, folder), folder / weights.file
    folder.mkdir(parents=True, exist_ok=True)
    failures: list[SourceError] = []
    if temporary.exists() and (left := temporary.stat().st_size):
        note(f"{weights.name}: going on from {format_size(left)}")
    try:
        for source, following in zip(weights.sources, [*weights.sources[1:], None], strict=True):
            try:
                _fetch_from(source, weights, temporary, progress, note)
            except SourceError as exc:
                failures.append(exc)
                if following is not None:
                    note(f"{source.title}: {exc}; trying {following.title}")
                continue
            temporary.replace(final)
            _sync_folder(folder)
            return final
    finally:
        with contextlib.suppress(OSError):
            if temporary.stat().st_size == 0:
                temporary.unlink()
    kind = IntegrityError if any(isinstance(f, WrongBytesError) for f in failures) else DownloadError
    reasons = "".join(f"\n  {s.title}: {f}" for s, f in zip(weights.sources, failures, strict=True))
    raise kind(f"no source could deliver {weights.name}:{reasons}") from (failures[-1] if failures else None)


def partial_path(weights: Weights, folder: Path) -> Path:
    """Where an unfinished fetch of `weights` is kept."""
    return folder / f"{weights.file}.partial"


@contextlib.contextmanager
def exclusive(path: Path, note: Note | None, what: str) -> Iterator[None]:
    """Hold the lock file at `path`, which the system releases when a process dies.

    While another process holds it: say so by `note` and wait, or raise DownloadError if `note` is None.
    """
    from filelock import FileLock, Timeout

    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(str(path))
    try:
        lock.acquire(timeout=0)
    except Timeout as exc:
        if note is None:
            raise DownloadError(f"another process is pulling {what}; stop it first, or wait for it") from exc
        note(f"another process is pulling {what}; waiting for it")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _fetch_from(source: Source, weights: Weights, temporary: Path, progress: Progress | None, note: Note) -> None:
    while True:
        with Partial(temporary, weights.n_bytes, weights.sha256, progress) as partial:
            resumed = partial.size > 0
            if partial.missing:
                _check_disk(temporary.parent, partial.missing + source.scratch_bytes, weights.name)
                source.fetch(partial)
            try:
                partial.verify()
            except WrongBytesError as exc:
                partial.truncate(0)
                if not resumed:
                    raise
                # What was there before may be at fault and not this source: it gets one chance from the start.
                note(f"{weights.name}: {exc}; starting anew")
                continue
            return


def _check_disk(folder: Path, needed: int, name: str) -> None:
    needed += _MARGIN_BYTES
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise StorageError(
            f"{name} needs {format_size(needed)} more in {folder}, and that disk has {format_size(free)} free; "
            f"make room, or set EDGE_SPEC_HOME to a folder on another disk"
        )


def _sync_folder(folder: Path) -> None:
    """Bring a rename to the disk, where the system can."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
