"""Read a GGUF file in place: metadata and tensor infos at once, tensor data when it is asked for.

The file is memory-mapped and its header is checked number by number (see `gguf_header`). Nothing is copied but what is
asked for, and only `dequantize` needs the `gguf` package.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from contextlib import suppress
from mmap import ACCESS_READ, mmap
from pathlib import Path
from stat import S_ISREG
from types import MappingProxyType, TracebackType
from typing import Final, TypeVar

import numpy as np
from numpy.typing import NDArray

from edge_spec.errors import ModelFormatError, ModelNotFoundError, UnsupportedArchitectureError
from edge_spec.formats.ggml import GGMLType
from edge_spec.formats.gguf_header import HeaderError, TensorInfo, TensorTable, read_header
from edge_spec.formats.gguf_values import GGUFArray, Value, ValueType

__all__ = ["INTEGERS", "GGMLType", "GGUFArray", "GGUFFile", "TensorInfo", "TensorTable", "Value", "ValueType"]

T = TypeVar("T")


class _Required:
    """The default of a key that has to be there."""


REQUIRED: Final = _Required()

INTEGERS = {GGMLType.I8, GGMLType.I16, GGMLType.I32, GGMLType.I64}

_SCATTERED = 8
"""From so many picked rows on the system is asked for them all: touched one by one, each waits for the disk."""


class GGUFFile:
    """An open GGUF file; a context manager.

    `version`, `n_bytes` (of the file), `alignment` (bytes), `metadata` (key to scalar, string or GGUFArray),
    `metadata_span` (where the key-value pairs lie in the file), `tensors` (name to TensorInfo, in the file's order).

    Raises ModelNotFoundError where there is no such file, ModelFormatError (path and reason) where it is not a whole,
    consistent GGUF of version 2 or 3.
    """

    def __init__(self, path: str | os.PathLike[str], data: mmap | None = None) -> None:
        """`data`: the file's bytes, where they are in memory already."""
        self.path = Path(path)
        self._data = _map(self.path) if data is None else data
        try:
            header = read_header(self._data)
        except HeaderError as exc:
            self._data.close()
            raise ModelFormatError(f"{self.path}: {exc}") from exc
        self.version = header.version
        self.n_bytes = len(self._data)
        self.alignment = header.alignment
        self.metadata: Mapping[str, Value] = MappingProxyType(header.metadata)
        self.metadata_span = header.metadata_span
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(header.tensors)

    def __enter__(self) -> GGUFFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let the file go; reading from it afterwards is a ValueError. Views from `raw` stay valid."""
        try:
            self._data.close()
        except BufferError:
            # A view from `raw` still needs the mapping, which goes with the last of them.
            self._data = mmap(-1, 1)
            self._data.close()

    @property
    def architecture(self) -> str:
        """The name of the model's architecture, `general.architecture`; ModelFormatError if the file has none."""
        return self.get_str("general.architecture")

    def hparam(self, name: str) -> str:
        """The full key of one of the architecture's parameters: `block_count` to `llama.block_count`."""
        return f"{self.architecture}.{name}"

    def get_int(self, key: str, default: int | _Required = REQUIRED) -> int:
        """An integer of any width. ModelFormatError if the key is missing without a default, or of another type."""
        return self._get(key, int, default)

    def get_float(self, key: str, default: float | _Required = REQUIRED) -> float:
        """A finite float; an integer is one too."""
        value = self.metadata.get(key)
        if type(value) is int:
            return float(value)
        number = self._get(key, float, default)
        if not math.isfinite(number):
            raise ModelFormatError(f"{self.path}: {key} is {number}, not a finite number")
        return number

    def get_bool(self, key: str, default: bool | _Required = REQUIRED) -> bool:
        """A truth value."""
        return self._get(key, bool, default)

    def get_str(self, key: str, default: str | _Required = REQUIRED) -> str:
        """A string."""
        return self._get(key, str, default)

    def hparam_int(self, name: str, default: int | _Required = REQUIRED) -> int:
        """`get_int` of an architecture's parameter."""
        return self.get_int(self.hparam(name), default)

    def hparam_float(self, name: str, default: float | _Required = REQUIRED) -> float:
        """`get_float` of an architecture's parameter."""
        return self.get_float(self.hparam(name), default)

    def hparam_str(self, name: str, default: str | _Required = REQUIRED) -> str:
        """`get_str` of an architecture's parameter."""
        return self.get_str(self.hparam(name), default)

    def get_array(self, key: str) -> NDArray[np.generic]:
        """An array of numbers or booleans, copied. ModelFormatError if it is missing or not one."""
        array = self._get(key, GGUFArray, REQUIRED)
        if array.type is ValueType.STRING:
            raise ModelFormatError(f"{self.path}: {key} holds strings, not numbers")
        return array.numpy()

    def get_strings(self, key: str) -> list[str]:
        """An array of strings, decoded. ModelFormatError if it is missing, not one, or not UTF-8."""
        array = self._get(key, GGUFArray, REQUIRED)
        if array.type is not ValueType.STRING:
            raise ModelFormatError(f"{self.path}: {key} holds numbers, not strings")
        return array.strings()

    def title(self, name: str) -> str:
        """What the file itself calls a tensor: for messages."""
        return name

    def raw(self, name: str) -> NDArray[np.uint8]:
        """A tensor's bytes as they lie in the file, read-only and mapped, shape [*shape[:-1], row_bytes]."""
        info = self._info(name)
        flat = np.frombuffer(self._data, np.uint8, info.n_bytes, info.offset)
        return flat.reshape(*info.shape[:-1], info.row_bytes)

    def slice_bytes(self, start: int, end: int) -> bytes:
        """A copy of the file's bytes from `start` up to `end`."""
        return self._data[start:end]

    def dequantize(self, name: str, rows: slice | NDArray[np.integer] | None = None) -> NDArray[np.float32]:
        """A tensor's values as float32, in its own shape; `rows` picks along the first of two or more axes.

        UnsupportedArchitectureError where the type is not a float's or nothing here can decode it.
        """
        info = self._info(name)
        if rows is None:
            return _dequantize(self.raw(name), info)
        if len(info.shape) < 2:
            raise ValueError(f"{name} is a vector: it has no rows to pick from")
        return _dequantize(self._raw_rows(name, rows), info)

    def release(self, name: str) -> None:
        """Let the system drop the pages of a tensor that was read; they come back from the file when touched."""
        info = self._info(name)
        self._advise("MADV_DONTNEED", info.offset, info.n_bytes)

    def _raw_rows(self, name: str, rows: slice | NDArray[np.integer]) -> NDArray[np.uint8]:
        raw = self.raw(name)
        if not isinstance(rows, slice) and len(rows) >= _SCATTERED:
            offset, n_bytes = self._info(name).offset, raw[0].nbytes
            with suppress(OSError):  # it is only a hint
                for row in np.unique(np.arange(len(raw))[rows]).tolist():
                    self._advise("MADV_WILLNEED", offset + row * n_bytes, n_bytes)
        return raw[rows]

    def _advise(self, advice: str, start: int, n_bytes: int) -> None:
        """Say what will become of so many bytes of the file, where the system can be told."""
        import mmap as platform

        if hasattr(platform, advice):
            page = start // platform.PAGESIZE * platform.PAGESIZE
            self._data.madvise(getattr(platform, advice), page, start + n_bytes - page)

    def _info(self, name: str) -> TensorInfo:
        try:
            return self.tensors[name]
        except KeyError:
            raise ModelFormatError(f"{self.path}: there is no tensor {name!r}") from None

    def _get(self, key: str, kind: type[T], default: T | _Required) -> T:
        value = self.metadata.get(key)
        if value is None:
            if isinstance(default, _Required):
                raise ModelFormatError(f"{self.path}: the key {key} is missing")
            return default
        # bool is a subclass of int, and a truth value is no count.
        if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
            raise ModelFormatError(f"{self.path}: {key} is of the type {type(value).__name__}, not {kind.__name__}")
        return value


def _map(path: Path) -> mmap:
    try:
        # Opening a pipe would wait for its other end, so the kind of file comes first.
        if not S_ISREG(path.stat().st_mode):
            raise ModelFormatError(f"{path}: it is not a regular file")
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                raise ModelFormatError(f"{path}: the file is empty")
            return mmap(file.fileno(), 0, access=ACCESS_READ)
    except FileNotFoundError as exc:
        raise ModelNotFoundError(f"there is no file {path}") from exc
    except (OSError, ValueError) as exc:
        raise ModelFormatError(f"{path}: it cannot be read ({exc})") from exc


def _dequantize(raw: NDArray[np.uint8], info: TensorInfo) -> NDArray[np.float32]:
    if info.type in INTEGERS:
        raise UnsupportedArchitectureError(f"the tensor {info.name} holds integers ({info.type.name}), not weights")
    if info.type is GGMLType.F32:
        return np.ascontiguousarray(raw).view("<f4").astype(np.float32)
    if info.type is GGMLType.F64:
        return np.ascontiguousarray(raw).view("<f8").astype(np.float32)
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize

    try:
        values = dequantize(np.ascontiguousarray(raw), GGMLQuantizationType(int(info.type)))
    except (NotImplementedError, ValueError) as exc:
        raise UnsupportedArchitectureError(
            f"the tensor {info.name} is of the type {info.type.name}, which the installed gguf package cannot decode"
        ) from exc
    return np.asarray(values, np.float32)
