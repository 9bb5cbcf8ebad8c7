"""The logits of a model whose output head has only some of the vocabulary's rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from edge_spec.backends.alignment import round_up
from edge_spec.backends.top_k import log_sum_exp, require_numbers, top_k
from edge_spec.export import Export
from edge_spec.formats.gguf import GGUFFile
from edge_spec.types import TOP_K, Decoded, Logits, Output, TopK

Written: TypeAlias = Mapping[str, NDArray[Any]]
"""What a graph with a trimmed head wrote, by the names of `export.graph`, each [rows, ...]."""

MAX_REACHED = 1024
"""Tokens that can be reached beside the head's; past that the ones of earlier texts are forgotten. A long prompt has a
few hundred that the head lacks, which cost a token nothing."""
_STEP = 64
"""Room for reached tokens grows by so many: a graph plans its memory anew for each width that it meets."""


class TrimmedHead:
    """Gives the graph the rows of tokens that were asked for beside its head, and reads its places as tokens."""

    def __init__(self, export: Export, ids: NDArray[np.int64], max_rows: int, source: GGUFFile) -> None:
        self._ids = ids
        self._source = source
        self._tensor = export.config.head_tensor
        self._softcap = export.config.logit_softcap
        self._n_vocab, self._hidden = export.config.n_vocab, export.config.hidden
        self._max_rows = max_rows
        self._spread: Logits | None = None
        self._forgotten = np.empty(0, np.int64)
        self._rows, self._bias = np.empty((self._hidden, 0), np.float32), np.empty(0, np.float32)
        self._scored, self._known = ids, bytearray()
        self._forget()

    @classmethod
    def of(cls, export: Export, max_rows: int, source: GGUFFile) -> TrimmedHead | None:
        """The trimmed head of an export, None if its head is whole."""
        ids = export.read_head_ids()
        return None if ids is None else cls(export, ids, max_rows, source)

    @property
    def inputs(self) -> dict[str, NDArray[np.float32]]:
        """What the graph takes by these names; a reached token changes them in place, or they are other arrays."""
        return {"reached": self._rows, "reached_bias": self._bias}

    @property
    def width(self) -> int:
        """Scores in a row that the graph writes, those of columns that no token has yet among them."""
        return len(self._ids) + len(self._bias)

    def reach(self, tokens: Iterable[int], *, anew: bool = False) -> bool:
        """Have these tokens scored too, by the source's own rows of the head; whether `inputs` are other arrays.

        `anew`: those of earlier texts no longer. They would cost time, and a draft would depend on what was before it.
        """
        if anew:
            self._forget()
            self._make_room(0)
        asked = set(tokens)
        new = self._unknown(asked)
        if not len(new):
            return anew
        if len(self._scored) - len(self._ids) + len(new) > MAX_REACHED:
            self._forget()
            new = self._unknown(asked)[:MAX_REACHED]
        first = len(self._scored) - len(self._ids)
        last = first + len(new)
        rows = self._source.dequantize(self._tensor, new)
        is_longer = last > len(self._bias)
        if is_longer:
            self._make_room(last)
        self._rows[:, first:last] = rows.T
        self._bias[first:last] = 0
        self._scored = np.concatenate([self._scored, new])
        for token in new:
            self._known[token] = True
        return is_longer or anew

    def buffers(self, rows: int) -> dict[str, NDArray[Any]]:
        """Room for what the graph writes of so many rows."""
        k = min(TOP_K, len(self._ids))
        widths = {"logits": self.width, "hidden": self._hidden, "top_logits": k, "log_sum": 1}
        room: dict[str, NDArray[Any]] = {name: np.empty((rows, n), np.float32) for name, n in widths.items()}
        return room | {"top_places": np.empty((rows, k), np.int64)}

    def read(self, written: Written, rows: int, want: Output) -> Decoded:
        """What is wanted of the first `rows` rows that the graph wrote; of all tokens that are not reached, nothing:
        their logits are minus infinity. BackendError where the likeliest have logits that are not numbers."""
        if want is Output.TOP_K:
            log_sum = written["log_sum"][:rows, 0]
            for total in log_sum:
                require_numbers(total)
            top = TopK(self._scored[written["top_places"][:rows]], written["top_logits"][:rows], log_sum)
            return Decoded(np.empty((0, self._n_vocab), np.float32), top)
        if not rows:  # a prompt was read
            return Decoded(np.empty((0, self._n_vocab), np.float32))
        if self._spread is None:  # a draft never needs it
            self._spread = np.full((self._max_rows, self._n_vocab), -np.inf, np.float32)
        self._spread[:, self._forgotten] = -np.inf
        self._forgotten = self._forgotten[:0]
        self._spread[:rows, self._scored] = written["logits"][:rows, : len(self._scored)]
        return Decoded(self._spread[:rows])

    def log_probs(self, written: Written, following: NDArray[np.int64]) -> Logits:
        """Log-probabilities [rows] of one token after each row.

        A token beyond the head is scored by the source's row, and counts in its own row only; nothing is reached by it.
        """
        n_rows, n_head = len(following), len(self._ids)
        logits, hidden = written["logits"][:n_rows, :n_head], written["hidden"][:n_rows]
        columns = np.minimum(np.searchsorted(self._ids, following), n_head - 1)
        sums, told = log_sum_exp(logits), logits[np.arange(n_rows), columns]
        beyond = np.flatnonzero(self._ids[columns] != following)
        if len(beyond):
            tokens, places = np.unique(following[beyond], return_inverse=True)
            rows = self._source.dequantize(self._tensor, tokens)[places]
            told[beyond] = self._capped(np.einsum("rh,rh->r", hidden[beyond], rows))
            sums[beyond] = np.logaddexp(sums[beyond], told[beyond])
        return told - sums

    def _unknown(self, tokens: set[int]) -> NDArray[np.int64]:
        return np.array(sorted(token for token in tokens if not self._known[token]), np.int64)

    def _capped(self, scores: Logits) -> Logits:
        return self._softcap * np.tanh(scores / self._softcap) if self._softcap else scores

    def _make_room(self, reached: int) -> None:
        """Inputs for so many reached tokens, with those that there are."""
        room = round_up(reached, _STEP)
        rows, bias = np.zeros((self._hidden, room), np.float32), np.full(room, -np.inf, np.float32)
        kept = min(room, len(self._bias))
        rows[:, :kept], bias[:kept] = self._rows[:, :kept], self._bias[:kept]
        self._rows, self._bias = rows, bias

    def _forget(self) -> None:
        if self._spread is not None:
            self._forgotten = np.concatenate([self._forgotten, self._scored[len(self._ids) :]])
        self._scored = self._ids
        self._known = bytearray(np.bincount(self._ids, minlength=self._n_vocab).astype(bool))
        self._bias[:] = -np.inf


def told(head: TrimmedHead | None, written: Written, rows: int, want: Output) -> Decoded:
    """What is wanted of the first `rows` rows that a graph wrote; `head` is None where its head is whole."""
    if head is not None:
        return head.read(written, rows, want)
    logits = written["logits"][:rows]
    return Decoded(logits) if want is Output.LOGITS else Decoded(logits[:0], top_k(logits))
