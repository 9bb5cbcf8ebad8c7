"""The rows of a model's embedding table, out of the mapped file that holds it."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial

import numpy as np
from numpy.typing import NDArray

from edge_spec.errors import ModelFormatError
from edge_spec.export import Export
from edge_spec.formats.gguf import GGUFFile

_TABLE = "token_embd.weight"
_KEPT = 512
"""Rows that stay decoded, 3 MiB of a width of 1,536. Decoding a row takes 0.2 ms between two passes, whose weights push
all else out of the processor's caches, and most tokens of a text were in it a moment ago."""
_FEW = 16
"""Rows up to which they are looked up one by one."""


class EmbeddingTable:
    """float32 rows of an export's embedding table, by token id. ModelFormatError if it does not fit the graph."""

    def __init__(self, export: Export, source: GGUFFile) -> None:
        self._hidden = export.config.hidden
        if source.tensors[_TABLE].shape != (export.config.n_vocab, self._hidden):
            raise ModelFormatError(f"{export.source_file}: the embedding table does not fit the graph")
        self._source = source
        self._row: Callable[[int], NDArray[np.float32]] = lru_cache(_KEPT)(partial(_read_row, source))

    def rows(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """float32 [len(ids), hidden]; an array of the caller's."""
        if len(ids) > _FEW:
            return self._source.dequantize(_TABLE, ids)
        found = np.empty((len(ids), self._hidden), np.float32)
        for place, token in enumerate(ids.tolist()):
            found[place] = self._row(token)
        return found


def _read_row(source: GGUFFile, token: int) -> NDArray[np.float32]:
    row: NDArray[np.float32] = source.dequantize(_TABLE, np.array([token]))[0]
    return row
