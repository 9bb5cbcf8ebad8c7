"""Write GGUF files through the `gguf` package: metadata from plain values, tensors one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_spec.formats.ggml import GGMLType


@dataclass(frozen=True, slots=True)
class NewTensor:
    """A tensor to write. `shape` counts values, rows first; `make` gives its bytes, and is called once, in order."""

    name: str
    type: GGMLType
    shape: tuple[int, ...]
    make: Callable[[], NDArray[Any]]

    @property
    def n_bytes(self) -> int:
        """Bytes in the file."""
        return int(np.prod(self.shape, dtype=np.int64)) // self.type.block_size * self.type.type_size


def write_metadata(path: Path, metadata: Mapping[str, Any]) -> None:
    """A file of these keys and no tensors; `general.architecture` has to be among them."""
    write_gguf(path, metadata, ())


def write_gguf(
    path: Path,
    metadata: Mapping[str, Any],
    tensors: Iterable[NewTensor],
    progress: Callable[[int, int], object] | None = None,
) -> None:
    """A file of these keys and tensors, of which one at a time is in memory. OSError if it cannot be written.

    Integers become uint32, or int32 in lists.
    """
    import gguf

    tensors = list(tensors)
    total, done = sum(tensor.n_bytes for tensor in tensors), 0
    writer = gguf.GGUFWriter(path, metadata["general.architecture"])
    try:
        for key, value in metadata.items():
            if key != "general.architecture":
                writer.add_key_value(key, value, *_value_type(value))
        for tensor in tensors:
            kind = gguf.GGMLQuantizationType(int(tensor.type))
            writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.n_bytes, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in tensors:
            writer.write_tensor_data(np.ascontiguousarray(tensor.make()))
            done += tensor.n_bytes
            if progress is not None:
                progress(done, total)
    finally:
        writer.close()


def _value_type(value: Any) -> tuple[Any, Any]:
    """GGUF's type of a value, and of its elements where it is a list."""
    import gguf

    names = {bool: "BOOL", int: "UINT32", float: "FLOAT32", str: "STRING"}
    if isinstance(value, list):
        first = value[0]
        element = "BOOL" if isinstance(first, bool) else "INT32" if isinstance(first, int) else names[type(first)]
        return gguf.GGUFValueType.ARRAY, gguf.GGUFValueType[element]
    kind = next(name for known, name in names.items() if isinstance(value, known))
    return gguf.GGUFValueType[kind], None
