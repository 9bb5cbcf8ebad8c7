"""Read a safetensors file in place: its header at once, tensor data when it is asked for.

A file is the header's length (8 bytes, little-endian), the header (JSON: name to dtype, shape and offsets), and the
data. Every number is checked against the rest of the file before it is used. Source: the format's description in the
safetensors project.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from mmap import ACCESS_READ, mmap
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_spec.errors import ModelFormatError

MAX_HEADER_BYTES = 64 << 20
MAX_TENSORS = 1 << 16
MAX_DIMS = 8

ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
"""Bytes of one value, by the types that a weight or its description may have here."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor's place: `start` in bytes of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    n_bytes: int

    @property
    def n_values(self) -> int:
        """How many values it has."""
        return math.prod(self.shape)


class SafetensorsFile:
    """An open file; a context manager. `tensors` are by name.

    Raises ModelFormatError (path and reason) where it is not a whole, consistent safetensors file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self._data = mmap(file.fileno(), 0, access=ACCESS_READ)
        except (OSError, ValueError) as exc:
            raise ModelFormatError(f"{path}: it cannot be read ({exc})") from exc
        try:
            self.tensors = self._read_header()
        except ModelFormatError:
            self.close()
            raise
        except (ValueError, KeyError, TypeError, RecursionError, AttributeError) as exc:
            self.close()
            raise ModelFormatError(f"{path}: its header is not a safetensors header ({exc!r})") from exc

    def __enter__(self) -> SafetensorsFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let the file go; views from `raw` stay valid."""
        try:
            self._data.close()
        except BufferError:
            # A view from `raw` still needs the mapping, which goes with the last of them.
            self._data = mmap(-1, 1)
            self._data.close()

    def raw(self, name: str) -> NDArray[np.uint8]:
        """A tensor's bytes as they lie in the file, read-only and mapped, shape [*shape[:-1], last width in bytes]."""
        tensor = self.tensors[name]
        flat = np.frombuffer(self._data, np.uint8, tensor.n_bytes, tensor.start)
        return flat.reshape(*tensor.shape[:-1], tensor.shape[-1] * ITEM_BYTES[tensor.dtype])

    def values(self, name: str) -> NDArray[np.float32]:
        """A tensor's values as float32, in its own shape."""
        tensor, raw = self.tensors[name], self.raw(name)
        if tensor.dtype == "BF16":
            return (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)
        kinds = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}
        if tensor.dtype not in kinds:
            raise ModelFormatError(f"{self.path}: the tensor {name} holds {tensor.dtype}, not weights")
        return raw.view(kinds[tensor.dtype]).astype(np.float32)

    def _read_header(self) -> dict[str, StoredTensor]:
        n_bytes = len(self._data)
        length = int.from_bytes(self._data[:8], "little")
        if n_bytes < 8 or length > min(n_bytes - 8, MAX_HEADER_BYTES):
            raise ModelFormatError(f"{self.path}: a header of {length} bytes in a file of {n_bytes}")
        header = json.loads(self._data[8 : 8 + length])
        header.pop("__metadata__", None)
        if len(header) > MAX_TENSORS:
            raise ModelFormatError(f"{self.path}: more than {MAX_TENSORS} tensors")
        tensors = {name: self._tensor(name, entry, 8 + length) for name, entry in header.items()}
        end = 8 + length
        for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.start, tensor.n_bytes)):
            if tensor.start < end:
                raise ModelFormatError(f"{self.path}: the tensor {tensor.name} overlaps another one")
            end = tensor.start + tensor.n_bytes
        return tensors

    def _tensor(self, name: str, entry: dict[str, Any], data_start: int) -> StoredTensor:
        dtype, shape = entry["dtype"], tuple(entry["shape"])
        start, end = entry["data_offsets"]
        if dtype not in ITEM_BYTES:
            raise ModelFormatError(
                f"{self.path}: the tensor {name} is of the type {dtype!r}; known are {', '.join(ITEM_BYTES)}"
            )
        whole = all(type(number) is int and number >= 0 for number in (*shape, start, end))
        if not whole or len(shape) > MAX_DIMS:
            raise ModelFormatError(f"{self.path}: the tensor {name} has the shape {shape} at {start} to {end}")
        n_bytes = math.prod(shape) * ITEM_BYTES[dtype]
        if n_bytes != end - start:
            raise ModelFormatError(
                f"{self.path}: the tensor {name} of the shape {shape} takes {n_bytes} bytes, not {end - start}"
            )
        if data_start + end > len(self._data):
            raise ModelFormatError(f"{self.path}: the tensor {name} ends behind the file's end: it is cut short")
        return StoredTensor(name, dtype, shape or (1,), data_start + start, n_bytes)
