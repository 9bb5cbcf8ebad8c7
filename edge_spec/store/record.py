"""What lies in the store's folders: the record beside a verified file, and sizes."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from edge_spec.store.hashing import write_json

_FILE = "model.json"


@dataclass(frozen=True, slots=True)
class Record:
    """What is written beside a file once it is verified."""

    name: str
    file: str
    n_bytes: int
    sha256: str
    licence: str | None
    architecture: str | None
    made_from: str | None = None
    """For a file that was made here: what of, and how."""

    @classmethod
    def read(cls, folder: Path) -> Record | None:
        """The record in a folder, None where there is none that makes sense."""
        try:
            record = cls(**json.loads((folder / _FILE).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None
        return record if Path(record.file).name == record.file else None

    @classmethod
    def read_all(cls, models: Path) -> Iterator[Record]:
        """Those in the folders below one."""
        for path in sorted(models.glob(f"*/{_FILE}")):
            if record := cls.read(path.parent):
                yield record

    def write(self, folder: Path) -> None:
        """Put it into a folder. Raises OSError."""
        write_json(folder / _FILE, asdict(self))


def has_size(path: Path, n_bytes: int) -> bool:
    """Whether a file is there and has so many bytes."""
    return path.is_file() and path.stat().st_size == n_bytes


def tree_bytes(folder: Path) -> int:
    """Bytes of the files below a folder, of which other processes may remove some meanwhile."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += (Path(parent) / name).stat().st_size
    return total
