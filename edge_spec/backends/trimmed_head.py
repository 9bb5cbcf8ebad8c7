"""The logits of a model whose output head has only some of the vocabulary's rows."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from edge_spec.backends.top_k import log_sum_exp, top_k
from edge_spec.export import Export
from edge_spec.formats.gguf import GGUFFile
from edge_spec.types import Decoded, Logits, Output, TopK

_MAX_REACHED = 1024
"""Tokens that can be reached beside the head's; past that the ones of earlier texts are forgotten. A long prompt has a
few hundred that the head lacks, and a thousand cost 0.2 ms a token."""


class TrimmedHead:
    """Reads a trimmed head's logits as those of the vocabulary, and scores tokens that were asked for in NumPy.

    `logits` float32 [max_rows, head rows] and `hidden` float32 [max_rows, hidden] are what the graph writes.
    """

    def __init__(self, export: Export, ids: NDArray[np.int64], max_rows: int, source: GGUFFile) -> None:
        self.logits: Logits = np.empty((max_rows, len(ids)), np.float32)
        self.hidden = np.empty((max_rows, export.config.hidden), np.float32)
        self._ids = ids
        self._source = source
        self._tensor = export.config.head_tensor
        self._softcap = export.config.logit_softcap
        self._known = np.zeros(export.config.n_vocab, bool)
        self._reached = self._forgotten = np.empty(0, np.int64)
        self._rows = np.empty((0, export.config.hidden), np.float32)
        self._spread: Logits | None = None
        self._forget()

    @classmethod
    def of(cls, export: Export, max_rows: int, source: GGUFFile) -> TrimmedHead | None:
        """The trimmed head of an export, None if its head is whole."""
        ids = export.read_head_ids()
        return None if ids is None else cls(export, ids, max_rows, source)

    def reach(self, tokens: Iterable[int]) -> None:
        """Score these tokens too, from the source's own rows of the head."""
        asked = np.unique(np.fromiter(tokens, np.int64))
        new = asked[~self._known[asked]]
        if not len(new):
            return
        if len(self._reached) + len(new) > _MAX_REACHED:
            self._forget()
            new = asked[~self._known[asked]][:_MAX_REACHED]
        self._reached = np.concatenate([self._reached, new])
        self._scored = np.concatenate([self._ids, self._reached])
        self._rows = np.concatenate([self._rows, self._source.dequantize(self._tensor, new)])
        self._known[new] = True

    def read(self, rows: int, want: Output) -> Decoded:
        """What is wanted of the first `rows` rows that the graph wrote; of all tokens that are not reached, nothing:
        their logits are minus infinity."""
        if want is Output.TOP_K:
            return Decoded(np.empty((0, len(self._known)), np.float32), self._top_k(rows))
        if self._spread is None:  # a draft never needs it
            self._spread = np.full((len(self.logits), len(self._known)), -np.inf, np.float32)
        self._spread[:, self._forgotten] = -np.inf
        self._forgotten = self._forgotten[:0]
        self._spread[:rows, self._ids] = self.logits[:rows]
        self._spread[:rows, self._reached] = self._score_reached(rows)
        return Decoded(self._spread[:rows])

    def log_probs(self, logits: Logits, hidden: Logits, following: NDArray[np.int64]) -> Logits:
        """Log-probabilities [rows] of one token after each row, of what the graph wrote elsewhere.

        A token beyond the head is scored by the source's row, and counts in its own row only; nothing is reached by it.
        """
        columns = np.minimum(np.searchsorted(self._ids, following), len(self._ids) - 1)
        sums, told = log_sum_exp(logits), logits[np.arange(len(logits)), columns]
        beyond = np.flatnonzero(self._ids[columns] != following)
        if len(beyond):
            tokens, places = np.unique(following[beyond], return_inverse=True)
            rows = self._source.dequantize(self._tensor, tokens)[places]
            told[beyond] = self._capped(np.einsum("rh,rh->r", hidden[beyond], rows))
            sums[beyond] = np.logaddexp(sums[beyond], told[beyond])
        return told - sums

    def _top_k(self, rows: int) -> TopK:
        scores = self.logits[:rows]
        if len(self._reached):
            scores = np.concatenate([scores, self._score_reached(rows)], axis=1)
        top = top_k(scores)
        return TopK(self._scored[top.ids], top.logits, top.log_sum)

    def _score_reached(self, rows: int) -> Logits:
        """Logits [rows, reached tokens]."""
        # Not by BLAS: its threads spin for a while after each call, and take the cores from the model's next pass.
        return self._capped(np.einsum("rh,kh->rk", self.hidden[:rows], self._rows))

    def _capped(self, scores: Logits) -> Logits:
        return self._softcap * np.tanh(scores / self._softcap) if self._softcap else scores

    def _forget(self) -> None:
        self._known[:] = False
        self._known[self._ids] = True
        self._forgotten = np.concatenate([self._forgotten, self._reached])
        self._reached = np.empty(0, np.int64)
        self._scored = self._ids
        self._rows = np.empty((0, self.hidden.shape[1]), np.float32)
