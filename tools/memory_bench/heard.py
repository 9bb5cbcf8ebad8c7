"""What a backend says that it allocated: llama.cpp in its log, the others by the buffers that they were given."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

_LINE = re.compile(r"(\S+)\s+(model|KV|RS|compute|output) buffer size =\s*([\d.]+) MiB")
_CONTEXT_PARTS = {"KV": "cache_bytes", "RS": "state_bytes", "compute": "compute_bytes", "output": "output_bytes"}


class LlamaLog:
    """Listens to llama.cpp from its making on; sums over all models that are loaded meanwhile.

    It stands in for the backend's own listener, and leaves it to the backend to import the library, in its own time.
    """

    def __init__(self) -> None:
        from edge_spec.backends import _llama_library as ours

        self._lines: list[str] = []
        collect = ours._collect_error

        def listen(level: int, text: bytes, _user_data: Any) -> None:
            if (line := text.decode(errors="replace")).find("buffer size =") >= 0:
                self._lines.append(line)
            collect(level, text, _user_data)

        ours._collect_error = listen

    def sums(self) -> dict[str, int]:
        """Bytes by what they are for, so far."""
        return sum_lines(self._lines)


def sum_lines(lines: Iterable[str]) -> dict[str, int]:
    """Bytes by what they are for, of the buffers that lines of llama.cpp's log tell of.

    The log's precision is a hundredth of a MiB a line.
    """
    found: dict[str, int] = {}
    for match in filter(None, map(_LINE.search, lines)):
        place, what, size = match.groups()
        name = _CONTEXT_PARTS.get(what, "repacked_bytes" if place.endswith("REPACK") else "mapped_weight_bytes")
        found[name] = found.get(name, 0) + round(float(size) * 2**20)
    return found


def buffers(model: Any) -> dict[str, int]:
    """Bytes of the arrays that a model that runs an export was given for keys and values, and its export's
    packed weights."""
    return {
        "cache_bytes": sum(array.nbytes for _, array in model._cache.arrays()),
        "stored_weight_bytes": model.spec.weight_bytes,
    }
