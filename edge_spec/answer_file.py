"""What was answered before, as token ids, in a private file of bounded size.

The file is a line that says what it is, then records: the number of ids and the CRC-32 of their bytes, each a 32-bit
integer, then the ids, all little-endian. Records are appended under a lock; when they would become too many, the newest
are written to a new file that takes the old one's place. A crash can leave part of the last record: readers stop
before it, and the next writer cuts it off.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from edge_spec.errors import StorageError

MAX_BYTES = 4 << 20
_FIRST_LINE = b"edge-spec answers 1\n"
_HEAD = struct.Struct("<II")
_ID_BYTES = 4
_PATIENCE_S = 2.0


class AnswerFile:
    """The answers in one file, oldest first. Only the user may read it; several processes may use it at once."""

    def __init__(self, path: Path, *, max_bytes: int = MAX_BYTES) -> None:
        self.path = path
        self._max_bytes = max_bytes

    def read(self) -> list[NDArray[np.int32]]:
        """The ids of each answer; none where there is no such file. Raises StorageError."""
        with _translated(self.path):
            records, _ = _parse(self._bytes())
        return [np.frombuffer(record, "<i4", offset=_HEAD.size).astype(np.int32) for record in records]

    def append(self, ids: Sequence[int]) -> None:
        """Keep one more answer, unless the very same is kept already; the oldest go when there are too many.

        Raises StorageError.
        """
        most = (self._max_bytes // 2 - _HEAD.size) // _ID_BYTES
        payload = np.asarray(ids[-most:], "<i4").tobytes()
        record = _HEAD.pack(len(payload) // _ID_BYTES, crc32(payload)) + payload
        with _translated(self.path), self._locked():
            data = self._bytes()
            records, length = _parse(data)
            if record in data[:length]:
                return
            if length == 0 or length + len(record) > self._max_bytes:
                self._replace([*records, record])
            else:
                self._extend(length, record)

    def clear(self) -> None:
        """Forget every answer. Raises StorageError."""
        with _translated(self.path), self._locked():
            self.path.unlink(missing_ok=True)
            self._partial.unlink(missing_ok=True)

    @property
    def _partial(self) -> Path:
        return self.path.with_name(f"{self.path.name}.partial")

    def _bytes(self) -> bytes:
        try:
            return self.path.read_bytes()
        except FileNotFoundError:
            return b""

    def _extend(self, length: int, record: bytes) -> None:
        """Put a record behind the first `length` bytes, which are whole."""
        with self.path.open("r+b") as file:
            os.chmod(self.path, 0o600)  # noqa: PTH101 - an older file may be open to others
            file.truncate(length)
            file.seek(length)
            file.write(record)

    def _replace(self, records: list[bytes]) -> None:
        """Make the file anew, with the newest of `records` that fill half of what it may hold."""
        kept: list[bytes] = []
        room = self._max_bytes // 2
        for record in reversed(records):
            room -= len(record)
            if room < 0:
                break
            kept.append(record)
        self._partial.unlink(missing_ok=True)
        with os.fdopen(os.open(self._partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(b"".join([_FIRST_LINE, *reversed(kept)]))
            file.flush()
            os.fsync(file.fileno())
        self._partial.replace(self.path)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the lock file, which the system releases when a process dies."""
        from filelock import FileLock, Timeout

        self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        try:
            with FileLock(f"{self.path}.lock", timeout=_PATIENCE_S, mode=0o600):
                yield
        except Timeout as exc:
            raise StorageError(f"{self.path} is being written by another process") from exc


def _parse(data: bytes) -> tuple[list[bytes], int]:
    """The whole records of a file, and how many of its bytes are whole: 0 if it is no such file."""
    if not data.startswith(_FIRST_LINE):
        return [], 0
    records, start = [], len(_FIRST_LINE)
    while start + _HEAD.size <= len(data):
        count, checksum = _HEAD.unpack_from(data, start)
        end = start + _HEAD.size + count * _ID_BYTES
        if end > len(data) or crc32(data[start + _HEAD.size : end]) != checksum:
            break
        records.append(data[start:end])
        start = end
    return records, start


@contextmanager
def _translated(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        raise StorageError(f"the history {path} cannot be used: {exc}") from exc
