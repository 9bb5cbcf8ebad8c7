"""The sha256 of a file, remembered for as long as the file is the same by path, size and time of change."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from pathlib import Path

from edge_spec.store.partial import sha256_of


def cached_sha256(path: Path, cache_folder: Path) -> str:
    """The sha256 of `path` in hexadecimal; the file is read only if it is new or has changed since."""
    path = path.resolve()
    before = _identity(path)
    entry = cache_folder / "sha256" / f"{hashlib.sha256(os.fsencode(path)).hexdigest()[:32]}.json"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        known = json.loads(entry.read_text(encoding="utf-8"))
        if known["identity"] == before:
            return str(known["sha256"])
    found = sha256_of(path)
    # A cache that cannot be written costs time, not correctness; a file that changed while it was read is not kept.
    with contextlib.suppress(OSError):
        if _identity(path) == before:
            write_json(entry, {"identity": before, "sha256": found})
    return found


def write_json(path: Path, value: object) -> None:
    """Write `value` so that a reader finds either the old file or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def _identity(path: Path) -> list[str | int]:
    status = path.stat()
    return [str(path), status.st_size, status.st_mtime_ns]
