"""Values in the metadata of a GGUF file: scalars, strings, and arrays that are decoded when they are asked for."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from enum import IntEnum
from mmap import mmap
from typing import TypeAlias, overload

import numpy as np
from numpy.typing import NDArray

from edge_spec.errors import ModelFormatError

Scalar: TypeAlias = bool | int | float | str
_U64 = struct.Struct("<Q")


class ValueType(IntEnum):
    """Type ids of metadata values."""

    UINT8 = 0
    INT8 = 1
    UINT16 = 2
    INT16 = 3
    UINT32 = 4
    INT32 = 5
    FLOAT32 = 6
    BOOL = 7
    STRING = 8
    ARRAY = 9
    UINT64 = 10
    INT64 = 11
    FLOAT64 = 12


DTYPES: dict[ValueType, np.dtype[np.generic]] = {
    ValueType.UINT8: np.dtype("<u1"),
    ValueType.INT8: np.dtype("<i1"),
    ValueType.UINT16: np.dtype("<u2"),
    ValueType.INT16: np.dtype("<i2"),
    ValueType.UINT32: np.dtype("<u4"),
    ValueType.INT32: np.dtype("<i4"),
    ValueType.FLOAT32: np.dtype("<f4"),
    ValueType.BOOL: np.dtype("?"),
    ValueType.UINT64: np.dtype("<u8"),
    ValueType.INT64: np.dtype("<i8"),
    ValueType.FLOAT64: np.dtype("<f8"),
}


class GGUFArray(Sequence[Scalar]):
    """An array in the metadata, decoded when it is asked for; its bounds were checked when the file was opened."""

    def __init__(self, data: mmap, name: str, value_type: ValueType, length: int, start: int) -> None:
        self._data = data
        self._name = name
        self._length = length
        self._start = start
        self.type = value_type

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, index: int) -> Scalar: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Scalar]: ...
    def __getitem__(self, index: int | slice) -> Scalar | Sequence[Scalar]:
        """One value, or a list of them. A string costs a walk over those before it."""
        if self.type is not ValueType.STRING:
            picked: Scalar | list[Scalar] = self.numpy()[index].tolist()
            return picked
        if isinstance(index, slice):
            return self.strings()[index]
        at = range(self._length)[index]
        position, read_length = self._start, _U64.unpack_from
        for _ in range(at):
            position += 8 + read_length(self._data, position)[0]
        return next(self._walk(position, at))

    def __iter__(self) -> Iterator[Scalar]:
        if self.type is ValueType.STRING:
            return self._walk()
        return iter(self.numpy().tolist())

    def numpy(self) -> NDArray[np.generic]:
        """A copy of the numbers or booleans. TypeError for strings."""
        if self.type is ValueType.STRING:
            raise TypeError(f"{self._name} holds strings")
        dtype = DTYPES[self.type]
        if self.type is ValueType.BOOL:
            flags: NDArray[np.bool_] = np.frombuffer(self._data, np.uint8, self._length, self._start) != 0
            return flags
        return np.frombuffer(self._data, dtype, self._length, self._start).copy()

    def strings(self) -> list[str]:
        """All strings. TypeError for numbers; ModelFormatError where one is not UTF-8."""
        if self.type is not ValueType.STRING:
            raise TypeError(f"{self._name} holds numbers")
        return list(self._walk())

    def _walk(self, position: int | None = None, first: int = 0) -> Iterator[str]:
        """The strings from number `first` on, which lies at `position` (default: the start)."""
        data, read_length = self._data, _U64.unpack_from
        position = self._start if position is None else position
        for index in range(first, self._length):
            start = position + 8
            position = start + read_length(data, position)[0]
            try:
                yield data[start:position].decode()
            except UnicodeDecodeError as exc:
                raise ModelFormatError(f"element {index} of {self._name} is not UTF-8 ({exc.reason})") from exc


Value: TypeAlias = Scalar | GGUFArray
