"""The rows of a model's embedding table, out of the mapped file that holds it."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
from numpy.typing import NDArray

from edge_spec.errors import ModelFormatError
from edge_spec.export import Export
from edge_spec.formats.gguf import GGUFFile

_TABLE = "token_embd.weight"
KEPT = 512
"""Rows that stay decoded, 3 MiB of a width of 1,536. Decoding a row takes 0.25 ms between two passes, whose weights
push all else out of the processor's caches, and most tokens of a text were in it a moment ago."""
_FEW = 16
"""Rows up to which they are kept, and looked up: a long pass would push out what the short ones need."""


class EmbeddingTable:
    """float32 rows of an export's embedding table, by token id. ModelFormatError if it does not fit the graph."""

    def __init__(self, export: Export, source: GGUFFile) -> None:
        if source.tensors[_TABLE].shape != (export.config.n_vocab, export.config.hidden):
            raise ModelFormatError(f"{export.source_file}: the embedding table does not fit the graph")
        self._source = source
        self._kept: OrderedDict[int, NDArray[np.float32]] = OrderedDict()

    def rows(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """float32 [len(ids), hidden]; an array of the caller's."""
        if len(ids) > _FEW:
            return self._source.dequantize(_TABLE, ids)
        tokens = ids.tolist()
        new = [token for token in dict.fromkeys(tokens) if token not in self._kept]
        if new:
            decoded = self._source.dequantize(_TABLE, np.array(new))
            self._kept.update((token, row.copy()) for token, row in zip(new, decoded, strict=True))
        found = np.array([self._kept[token] for token in tokens])
        for token in tokens:
            self._kept.move_to_end(token)
        while len(self._kept) > KEPT:
            self._kept.popitem(last=False)
        return found
