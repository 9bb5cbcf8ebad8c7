"""What was measured or learnt, kept between runs: a JSON object in a file that may be lost at any time."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

_MAX_ENTRIES = 200


class CacheFile:
    """Values by key. A file that cannot be read is empty, one that cannot be written is not; neither is an error.

    Of two processes that write at once one wins, whole. The oldest entries go when there are too many.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def get(self, key: str) -> Any:
        """The value, None if there is none."""
        return self._read().get(key)

    def items(self) -> list[tuple[str, Any]]:
        """Every key with its value, the oldest first."""
        return list(self._read().items())

    def put(self, key: str, value: Any) -> None:
        """Keep a JSON value."""
        entries = self._read()
        entries.pop(key, None)
        entries[key] = value
        newest = dict(list(entries.items())[-_MAX_ENTRIES:])
        partial = self._path.with_name(f"{self._path.name}.{os.getpid()}.partial")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(json.dumps(newest, indent=1), "utf-8")
            partial.replace(self._path)
        except OSError:
            partial.unlink(missing_ok=True)

    def _read(self) -> dict[str, Any]:
        try:
            entries = json.loads(self._path.read_text("utf-8"))
        except (OSError, ValueError):
            return {}
        return entries if isinstance(entries, dict) else {}
