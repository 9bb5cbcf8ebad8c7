"""Parse the header of a GGUF file (versions 2 and 3, little-endian) without trusting any number in it.

Layout: magic, version, number of tensors, number of keys, the key-value pairs, the tensor infos, padding, tensor data.
Every count is compared with what the rest of the file can hold before anything is allocated or looped over, and with
fixed ceilings that no real model comes near, so that a hostile file fails in bounded time and memory.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from mmap import mmap
from typing import Protocol, TypeVar

import numpy as np

from edge_spec.formats.ggml import BY_ID, GGMLType
from edge_spec.formats.gguf_values import DTYPES, GGUFArray, Scalar, Value, ValueType

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32

MAX_KEYS = 1 << 14
MAX_TENSORS = 1 << 16
MAX_KEY_BYTES = (1 << 16) - 1
"""The GGUF specification's own limit; tensor names share it here."""
MAX_TEXT_BYTES = 64 << 20
"""All keys, names and string values together."""
MAX_ARRAY_STRINGS = 1 << 22
"""All strings in arrays together; the largest vocabularies with their merges stay below a million."""
MAX_ALIGNMENT = 1 << 20
MAX_DIMS = 4

_MIN_KEY_BYTES = 8 + 1 + 4 + 1
_MIN_TENSOR_BYTES = 8 + 1 + 4 + 8 + 4 + 8

T = TypeVar("T")
_U64 = struct.Struct("<Q")
_U32 = struct.Struct("<I")


class HeaderError(Exception):
    """Why a header cannot be read; the file's path is added by who opened it."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies and what it is. `shape` is in numpy order: outermost first, the row's length last."""

    name: str
    shape: tuple[int, ...]
    type: GGMLType
    offset: int
    """From the start of the file, in bytes."""
    n_bytes: int
    n_elements: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one row (the last axis)."""
        return self.shape[-1] // self.type.block_size * self.type.type_size


class TensorTable(Protocol):
    """Whatever lists a model's tensors: an open file, or what was read of one."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Tensors by name."""
        ...


@dataclass(frozen=True, slots=True)
class Header:
    """What stands before the tensor data. `metadata_span` is where the key-value pairs lie, in bytes."""

    version: int
    alignment: int
    metadata: dict[str, Value]
    metadata_span: tuple[int, int]
    tensors: dict[str, TensorInfo]


class _Reader:
    """A cursor that refuses to leave the file."""

    def __init__(self, data: mmap) -> None:
        self.data = data
        self.position = 0
        self.text_bytes = 0
        self.array_strings = 0

    @property
    def remaining(self) -> int:
        return len(self.data) - self.position

    def take(self, n_bytes: int, what: str) -> int:
        """Move over `n_bytes`, return where they start."""
        if n_bytes > self.remaining:
            raise HeaderError(f"truncated: {what} needs {n_bytes} bytes at {self.position}, {self.remaining} are left")
        start = self.position
        self.position += n_bytes
        return start

    def u32(self, what: str) -> int:
        return int(_U32.unpack_from(self.data, self.take(4, what))[0])

    def u64(self, what: str) -> int:
        return int(_U64.unpack_from(self.data, self.take(8, what))[0])

    def count(self, what: str, smallest: int, ceiling: int) -> int:
        """A number of items of at least `smallest` bytes that are still to come."""
        count = self.u64(what)
        if count > ceiling:
            raise HeaderError(f"{what} of {count} is more than the {ceiling} that are accepted")
        if count * smallest > self.remaining:
            raise HeaderError(f"{what} of {count} cannot fit in the {self.remaining} bytes that are left")
        return count

    def text(self, what: str, ceiling: int = MAX_TEXT_BYTES) -> str:
        length = self.count(f"the length of {what}", 1, ceiling)
        self.text_bytes += length
        if self.text_bytes > MAX_TEXT_BYTES:
            raise HeaderError(f"more than {MAX_TEXT_BYTES} bytes of keys, names and strings")
        start = self.take(length, what)
        try:
            return self.data[start : start + length].decode()
        except UnicodeDecodeError as exc:
            raise HeaderError(f"{what} is not UTF-8 ({exc.reason} at byte {exc.start})") from exc

    def value_type(self, what: str) -> ValueType:
        number = self.u32(f"the type of {what}")
        try:
            return ValueType(number)
        except ValueError:
            raise HeaderError(f"{what} has the unknown value type {number}") from None

    def value(self, key: str) -> Value:
        kind = self.value_type(key)
        if kind is ValueType.STRING:
            return self.text(f"the value of {key}")
        if kind is ValueType.ARRAY:
            return self.array(key)
        dtype = DTYPES[kind]
        start = self.take(dtype.itemsize, f"the value of {key}")
        if kind is ValueType.BOOL:
            return self.data[start] != 0
        scalar: Scalar = np.frombuffer(self.data[start : start + dtype.itemsize], dtype)[0].item()
        return scalar

    def array(self, key: str) -> GGUFArray:
        kind = self.value_type(f"the elements of {key}")
        if kind is ValueType.ARRAY:
            raise HeaderError(f"{key} is an array of arrays, which no model file needs")
        what = f"the array length of {key}"
        if kind is not ValueType.STRING:
            length = self.count(what, DTYPES[kind].itemsize, len(self.data))
            start = self.take(length * DTYPES[kind].itemsize, key)
            return GGUFArray(self.data, key, kind, length, start)
        length = self.count(what, 8, MAX_ARRAY_STRINGS)
        self.array_strings += length
        if self.array_strings > MAX_ARRAY_STRINGS:
            raise HeaderError(f"the arrays hold more than {MAX_ARRAY_STRINGS} strings")
        start = self.position
        self._skip_strings(key, length)
        return GGUFArray(self.data, key, kind, length, start)

    def _skip_strings(self, key: str, length: int) -> None:
        data, position, last, read_length = self.data, self.position, len(self.data) - 8, _U64.unpack_from
        for index in range(length):
            if position > last:
                raise HeaderError(f"truncated: element {index} of {key} lies outside the file")
            position += 8 + read_length(data, position)[0]
        if position > len(data):
            raise HeaderError(f"truncated: the last element of {key} lies outside the file")
        self.position = position


def read_header_of(start: bytes, n_bytes: int) -> None:
    """Check that `start`, the first bytes of a file of `n_bytes`, has its whole header. HeaderError says what is wrong.

    Only for telling whether more has to be fetched: the header is read again where the file is put together.
    """
    with mmap(-1, max(1, len(start))) as data:
        data.write(start)
        read_header(data, n_bytes)


def read_header(data: mmap, n_bytes: int | None = None) -> Header:
    """Read and check everything before the tensor data. HeaderError says what is wrong.

    `n_bytes`: the file's length, where `data` is only its start.
    """
    reader = _Reader(data)
    if data[:4] != MAGIC:
        raise HeaderError("it is not a GGUF file (it does not start with the letters GGUF)")
    reader.position = 4
    version = reader.u32("the version")
    if version not in VERSIONS:
        if int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS:
            raise HeaderError("it is a big-endian GGUF; convert it to little-endian")
        raise HeaderError(f"it is GGUF version {version}; versions 2 and 3 are read here: convert the model again")
    n_tensors = reader.count("the number of tensors", _MIN_TENSOR_BYTES, MAX_TENSORS)
    n_keys = reader.count("the number of keys", _MIN_KEY_BYTES, MAX_KEYS)
    start = reader.position
    metadata = _unique(n_keys, "key", lambda: reader.text("a key", MAX_KEY_BYTES), reader.value)
    span = (start, reader.position)
    alignment = _alignment(metadata)
    drafts = _unique(
        n_tensors, "tensor", lambda: reader.text("a tensor's name", MAX_KEY_BYTES), lambda name: _tensor(reader, name)
    )
    data_start = -(-reader.position // alignment) * alignment
    tensors = {
        name: TensorInfo(name, t.shape, t.type, data_start + t.offset, t.n_bytes, t.n_elements)
        for name, t in drafts.items()
    }
    _check_places(tensors.values(), data_start, alignment, len(data) if n_bytes is None else n_bytes)
    return Header(version, alignment, metadata, span, tensors)


def _unique(count: int, what: str, read_name: Callable[[], str], read: Callable[[str], T]) -> dict[str, T]:
    found: dict[str, T] = {}
    for _ in range(count):
        name = read_name()
        if name in found:
            raise HeaderError(f"the {what} {name!r} appears twice")
        found[name] = read(name)
    return found


def _alignment(metadata: dict[str, Value]) -> int:
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if type(alignment) is not int or not 1 <= alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
        raise HeaderError(f"general.alignment is {alignment!r}, not a power of two up to {MAX_ALIGNMENT}")
    return alignment


def _tensor(reader: _Reader, name: str) -> TensorInfo:
    """A tensor's info, its offset still relative to the start of the tensor data."""
    n_dims = reader.u32(f"the dimensions of {name!r}")
    if not 1 <= n_dims <= MAX_DIMS:
        raise HeaderError(f"the tensor {name!r} has {n_dims} dimensions; 1 to {MAX_DIMS} are possible")
    shape = tuple(reader.u64(f"the shape of {name!r}") for _ in range(n_dims))[::-1]
    number = reader.u32(f"the type of {name!r}")
    kind = BY_ID.get(number)
    if kind is None:
        raise HeaderError(f"the tensor {name!r} has the unknown type {number}")
    offset = reader.u64(f"the offset of {name!r}")
    if 0 in shape:
        raise HeaderError(f"the tensor {name!r} is empty: shape {shape}")
    if shape[-1] % kind.block_size:
        raise HeaderError(f"the rows of {name!r} ({shape[-1]}) are no multiple of {kind.name}'s {kind.block_size}")
    n_elements = math.prod(shape)
    return TensorInfo(name, shape, kind, offset, n_elements // kind.block_size * kind.type_size, n_elements)


def _check_places(tensors: Iterable[TensorInfo], data_start: int, alignment: int, n_bytes: int) -> None:
    ordered = sorted(tensors, key=lambda t: t.offset)
    end, before = data_start, ""
    for tensor in ordered:
        if tensor.offset % alignment:
            raise HeaderError(f"the tensor {tensor.name!r} is not aligned to {alignment} bytes")
        if tensor.offset < end:
            raise HeaderError(f"the tensors {before!r} and {tensor.name!r} overlap")
        end, before = tensor.offset + tensor.n_bytes, tensor.name
        if end > n_bytes:
            raise HeaderError(f"truncated: the tensor {before!r} ends at byte {end}, the file at {n_bytes}")
