"""The file that a pull is writing, and what a source has to do to fill it."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from types import TracebackType
from typing import Protocol

from edge_spec.errors import DownloadError
from edge_spec.types import Progress


class SourceError(Exception):
    """One source could not deliver; the message is the reason, and the next source is tried."""


class WrongBytesError(SourceError):
    """A source delivers (or announces) another file than the one that is pinned."""


class Partial:
    """A file under a temporary name that grows to `n_bytes` from its start, and reports its length as it grows.

    `sha256` is what the whole file has to have.

    What an earlier, interrupted pull left is kept. Every source of a model delivers the same bytes, so it may be
    continued by another source; should the prefix be wrong after all, the final sha256 shows it.
    """

    def __init__(self, path: Path, n_bytes: int, sha256: str, progress: Progress | None = None) -> None:
        self.path = path
        self.n_bytes = n_bytes
        self.sha256 = sha256
        self._progress = progress
        self._reported = 0
        self._file = path.open("ab")
        self._size = path.stat().st_size
        if self._size > n_bytes:
            self.truncate(0)

    @property
    def size(self) -> int:
        """Bytes that are in place."""
        return self._size

    @property
    def missing(self) -> int:
        """Bytes that are still to come."""
        return self.n_bytes - self._size

    def append(self, chunk: bytes) -> None:
        """Write `chunk` at the end. Raises WrongBytesError if the source sends more than the file has."""
        if len(chunk) > self.missing:
            raise WrongBytesError(f"sent more than the {self.n_bytes} bytes that were expected")
        self._file.write(chunk)
        self._size += len(chunk)
        self.report()

    def truncate(self, size: int) -> None:
        """Keep the first `size` bytes."""
        assert 0 <= size <= self._size
        self._file.flush()
        self._file.truncate(size)
        self._size = size
        self._reported = min(self._reported, size)

    def report(self, underway: int = 0) -> None:
        """Tell the progress callback the length, plus `underway` bytes that were fetched and not yet appended.

        Raises DownloadError if the callback asks to stop.
        """
        done = max(self._reported, min(self._size + underway, self.n_bytes))
        self._reported = done
        if self._progress is not None and self._progress(done, self.n_bytes) is False:
            raise DownloadError("the pull was stopped; the same command resumes it")

    def verify(self) -> None:
        """Bring the file to the disk and compare its length and hash; WrongBytesError if they differ."""
        self._file.flush()
        os.fsync(self._file.fileno())
        if self.missing:
            raise SourceError(f"{self.missing} bytes are missing")
        found = sha256_of(self.path)
        if found != self.sha256:
            raise WrongBytesError(f"the sha256 is {found}, and {self.sha256} was expected")

    def __enter__(self) -> Partial:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def sha256_of(path: Path) -> str:
    """The file's sha256 in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Source(Protocol):
    """A place that can deliver a model file."""

    @property
    def title(self) -> str:
        """What the place is called in messages."""
        ...

    @property
    def scratch_bytes(self) -> int:
        """Disk space that fetching takes beside the file itself."""
        ...

    def fetch(self, partial: Partial) -> None:
        """Append until nothing is missing.

        Raises SourceError if that fails; the next attempt goes on from what was appended by then.
        """
        ...
