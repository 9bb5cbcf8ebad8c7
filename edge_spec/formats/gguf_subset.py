"""Write a GGUF that has another one's metadata and only some of its tensors, all bytes as they were."""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from pathlib import Path

from edge_spec.formats.gguf import GGUFFile
from edge_spec.formats.gguf_header import MAGIC, VERSIONS, TensorInfo


def write_subset(source: GGUFFile, path: str | os.PathLike[str], tensors: Sequence[str]) -> None:
    """Write `path` with the key-value pairs of `source` and the named tensors, in that order.

    ModelFormatError if a tensor is not there; OSError if the file cannot be written.
    """
    start, end = source.metadata_span
    pairs = source.slice_bytes(start, end)
    views = [source.raw(name) for name in tensors]
    infos, offset = b"", 0
    for name in tensors:
        infos += _tensor_info(source.tensors[name], offset)
        offset = _align(offset + source.tensors[name].n_bytes, source.alignment)
    header = MAGIC + struct.pack("<IQQ", VERSIONS[-1], len(tensors), len(source.metadata)) + pairs + infos
    with Path(path).open("wb") as file:
        file.write(header)
        for view in views:
            file.write(b"\0" * (_align(file.tell(), source.alignment) - file.tell()))
            file.write(view.data)


def _tensor_info(tensor: TensorInfo, offset: int) -> bytes:
    """A tensor's entry in the header; `offset` counts from the start of the tensor data."""
    name = tensor.name.encode()
    return (
        struct.pack("<Q", len(name))
        + name
        + struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *reversed(tensor.shape))
        + struct.pack("<IQ", int(tensor.type), offset)
    )


def _align(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment
