"""Write small GGUF files for tests, whole or wrong on purpose."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from edge_spec.formats.gguf import GGUFArray, GGUFFile

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
_FORMATS = {
    U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", F32: "f", BOOL: "?", U64: "Q", I64: "q", F64: "d",
}  # fmt: skip


class Typed(NamedTuple):
    """A metadata value with an explicit type; a list with the type of its elements is an array."""

    kind: int
    value: Any


class TensorSpec(NamedTuple):
    """A tensor: `dims` in ggml order (the row's length first), `kind` its type id, `data` its bytes."""

    name: str
    dims: tuple[int, ...]
    kind: int
    data: bytes


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def value(item: Any) -> bytes:
    """A metadata value with its type before it: str, bool, int (uint32), float (float32), lists of them, or Typed."""
    kind, plain = item if isinstance(item, Typed) else (_kind(item), item)
    if isinstance(plain, (list, tuple)):
        return struct.pack("<IIQ", ARRAY, kind, len(plain)) + b"".join(_bare(kind, element) for element in plain)
    return struct.pack("<I", kind) + _bare(kind, plain)


def _kind(item: Any) -> int:
    if isinstance(item, (list, tuple)):
        return _kind(item[0])
    kinds: dict[type, int] = {str: STRING, bytes: STRING, bool: BOOL, int: U32, float: F32}
    return kinds[type(item)]


def _bare(kind: int, item: Any) -> bytes:
    return text(item) if kind == STRING else struct.pack("<" + _FORMATS[kind], item)


def build_gguf(
    metadata: Mapping[str, Any] | Iterable[tuple[str, Any]] = (),
    tensors: Sequence[TensorSpec] = (),
    *,
    version: int = 3,
    alignment: int = 32,
) -> bytes:
    """The bytes of a GGUF file; tensors follow each other, each aligned."""
    pairs = list(metadata.items() if isinstance(metadata, Mapping) else metadata)
    out = bytearray(b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(pairs)))
    for key, item in pairs:
        out += text(key) + value(item)
    body = bytearray()
    for tensor in tensors:
        dims = struct.pack(f"<{len(tensor.dims)}Q", *tensor.dims)
        out += text(tensor.name) + struct.pack("<I", len(tensor.dims)) + dims
        out += struct.pack("<IQ", tensor.kind, len(body))
        body += tensor.data + bytes(-len(tensor.data) % alignment)
    if tensors:
        out += bytes(-len(out) % alignment)
    return bytes(out + body)


def metadata_of(gguf: GGUFFile) -> dict[str, Any]:
    """A file's metadata, as `build_gguf` takes it."""
    pairs = gguf.metadata.items()
    return {key: Typed(item.type, list(item)) if isinstance(item, GGUFArray) else item for key, item in pairs}


def write_gguf(path: Path, metadata: Any = (), tensors: Sequence[TensorSpec] = (), **options: Any) -> Path:
    path.write_bytes(build_gguf(metadata, tensors, **options))
    return path
