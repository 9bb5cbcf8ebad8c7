"""A checkpoint as the GGUF that llama.cpp's converter would make of it, without making one.

Same names, same order of rows, same keys: whatever reads a GGUF reads a checkpoint. Matrices stay in the type that they
are stored in, vectors are float32, and nothing is copied but what is asked for.
"""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from mmap import mmap
from pathlib import Path
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from edge_spec.checkpoint.folder import Checkpoint
from edge_spec.checkpoint.hparams import find_family, is_tied, read_hparams
from edge_spec.checkpoint.metadata import tokenizer_metadata
from edge_spec.errors import ModelFormatError
from edge_spec.formats.ggml import GGMLType
from edge_spec.formats.gguf import GGUFFile, TensorInfo
from edge_spec.formats.gguf_writer import write_metadata
from edge_spec.formats.safetensors import SafetensorsFile, StoredTensor

_TYPES = {
    "F64": GGMLType.F64,
    "F32": GGMLType.F32,
    "F16": GGMLType.F16,
    "BF16": GGMLType.BF16,
    "I64": GGMLType.I64,
    "I32": GGMLType.I32,
    "I16": GGMLType.I16,
    "I8": GGMLType.I8,
    "U8": GGMLType.I8,
    "BOOL": GGMLType.I8,
}
_FLOATS = ("F64", "F32", "F16", "BF16")
_BUFFER = ".rotary_emb.inv_freq"
"""Frequencies that older checkpoints keep beside the weights; the config says the same."""


class CheckpointSource(GGUFFile):
    """A checkpoint of a family that our own graph builder knows; a context manager like any GGUF.

    Raises UnsupportedArchitectureError for other families and what departs from them, ModelFormatError for damage.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.family = find_family(checkpoint)
        keys, rotary = read_hparams(checkpoint, self.family)
        keys |= tokenizer_metadata(checkpoint, checkpoint.get_int("vocab_size"))
        super().__init__(checkpoint.path, _in_memory(keys))
        self._permuted: dict[str, NDArray[np.int64]] = {}
        self._made = {name: table.view(np.uint8) for name, table in rotary.tables.items()}
        self._open = ExitStack()
        try:
            stored = self._open.enter_context(checkpoint.open_weights())
            self._stored = self._named(stored, tied=is_tied(checkpoint, self.family))
        except BaseException:
            self.close()
            raise
        tensors = {name: _info(name, file.tensors[title]) for name, (file, title) in self._stored.items()}
        tables = {name: _table(name, len(raw) // 4) for name, raw in self._made.items()}
        self.tensors = MappingProxyType(tensors | tables)
        self.n_bytes = checkpoint.weight_bytes

    def close(self) -> None:
        """See `GGUFFile.close`."""
        self._open.close()
        super().close()

    def title(self, name: str) -> str:
        """The checkpoint's own name of a tensor."""
        return self.family.stored_name(name)

    def raw(self, name: str) -> NDArray[np.uint8]:
        """See `GGUFFile.raw`: as a GGUF would have it, so a copy where rows are in another order."""
        self._info(name)
        if name in self._made:
            return self._made[name]
        file, title = self._stored[name]
        if len(file.tensors[title].shape) == 1:
            return self._vector(name, file.values(title) if file.tensors[title].dtype in _FLOATS else file.raw(title))
        order = self._order(name)
        return file.raw(title) if order is None else file.raw(title)[order]

    def release(self, name: str) -> None:
        """See `GGUFFile.release`; the system drops mapped pages by itself."""
        self._info(name)

    def _raw_rows(self, name: str, rows: slice | NDArray[np.integer]) -> NDArray[np.uint8]:
        order = self._order(name)
        if order is None or name not in self._stored:
            return self.raw(name)[rows]
        file, title = self._stored[name]
        return file.raw(title)[order[rows]]

    def _vector(self, name: str, values: NDArray[np.float32] | NDArray[np.uint8]) -> NDArray[np.uint8]:
        if values.dtype != np.float32:
            return values.view(np.uint8)
        order = self._order(name)
        values = values if order is None else values[order]
        if self.family.shifted_norms and name.endswith("norm.weight"):
            values = values + np.float32(1)
        return np.ascontiguousarray(values, np.float32).view(np.uint8)

    def _order(self, name: str) -> NDArray[np.int64] | None:
        """The rows of a checkpoint's tensor in a GGUF's order; None where it is the same."""
        part = name.split(".")[2] if name.startswith("blk.") else ""
        return self._permuted.get(part)

    def _named(self, stored: dict[str, SafetensorsFile], *, tied: bool) -> dict[str, tuple[SafetensorsFile, str]]:
        """Tensors by a GGUF's names, with the file and the name that they are stored under."""
        named: dict[str, tuple[SafetensorsFile, str]] = {}
        for title, file in stored.items():
            name = self.family.gguf_name(title)
            if title.endswith(_BUFFER) or (tied and name == "output.weight"):
                continue
            if self.family.permuted:
                self._permute(name, title, file.tensors[title].shape)
            named[name] = file, title
        if not tied and "output.weight" not in named:
            raise ModelFormatError(
                f"{self.path}: the tensor {self.title('output.weight')} is missing, and tie_word_embeddings is false"
            )
        return named

    def _permute(self, name: str, title: str, shape: tuple[int, ...]) -> None:
        """Keep the order of rows of a query's or key's tensor, once its shape is known to be that of its heads."""
        part = name.split(".")[2] if name.startswith("blk.") else ""
        heads = {"attn_q": "attention.head_count", "attn_k": "attention.head_count_kv"}
        if part not in heads:
            return
        n_head, head_dim = self.hparam_int(heads[part]), self.hparam_int("attention.key_length")
        if shape[0] != n_head * head_dim or head_dim % 2:
            raise ModelFormatError(
                f"{self.path}: {title} has the shape {shape}, and {n_head} heads of {head_dim} values in the config"
            )
        if part not in self._permuted:
            self._permuted[part] = _side_by_side(n_head, head_dim)


def _in_memory(keys: dict[str, object]) -> mmap:
    """The bytes of a GGUF of these keys."""
    with tempfile.TemporaryDirectory(prefix="edge-spec-") as folder:
        path = Path(folder) / "keys.gguf"
        write_metadata(path, keys)
        data = path.read_bytes()
    memory = mmap(-1, len(data))
    memory[:] = data
    return memory


def _info(name: str, tensor: StoredTensor) -> TensorInfo:
    kind = _TYPES[tensor.dtype]
    if len(tensor.shape) == 1 and tensor.dtype in _FLOATS:
        kind = GGMLType.F32
    return TensorInfo(name, tensor.shape, kind, 0, tensor.n_values * kind.type_size, tensor.n_values)


def _table(name: str, length: int) -> TensorInfo:
    return TensorInfo(name, (length,), GGMLType.F32, 0, 4 * length, length)


def _side_by_side(n_head: int, head_dim: int) -> NDArray[np.int64]:
    """Row i of a GGUF's query or key is row `order[i]` of the checkpoint's: first and second halves of a head take
    turns."""
    rows = np.arange(n_head * head_dim, dtype=np.int64)
    return rows.reshape(n_head, 2, head_dim // 2).swapaxes(1, 2).reshape(-1)
