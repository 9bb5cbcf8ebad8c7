"""Trimmed output heads: a draft that only scores the tokens which are likely to be wanted.

The head of a small model with a large vocabulary is a quarter of what a token costs. Byte-pair merges are made in order
of frequency, so the first ids are the frequent ones; control tokens stay whatever their ids. What a text needs beyond
these is mostly in its prompt already, and can be made reachable for it (`OnnxModel.reach`).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edge_spec.formats.gguf import GGUFFile

_CONTROL, _USER_DEFINED = 3, 4
"""Token types in `tokenizer.ggml.token_type`. Source: llama.cpp `llama.h`, LLAMA_TOKEN_TYPE_*."""

_LEAST_SAVED = 1 / 8
"""A head that would lose less than this share of its rows is left whole."""


def head_ids(gguf: GGUFFile, n_vocab: int, head_rows: int) -> NDArray[np.int64] | None:
    """Ids that a head of about `head_rows` rows keeps, increasing; None where it should be left whole."""
    return kept_ids(marked_ids(gguf), n_vocab, head_rows) if head_rows else None


def marked_ids(gguf: GGUFFile) -> NDArray[np.int64]:
    """Ids of the tokens that a trimmed head keeps wherever they stand: control tokens and those of the model's user."""
    if "tokenizer.ggml.token_type" not in gguf.metadata:
        return np.empty(0, np.int64)
    types = gguf.get_array("tokenizer.ggml.token_type")
    return np.flatnonzero((types == _CONTROL) | (types == _USER_DEFINED))


def kept_ids(marked: NDArray[np.int64], n_vocab: int, head_rows: int) -> NDArray[np.int64] | None:
    """The first `head_rows` ids and the marked ones, increasing; None where the head should be left whole."""
    if not head_rows:
        return None
    kept = np.arange(n_vocab) < head_rows
    kept[marked[marked < n_vocab]] = True
    ids = np.flatnonzero(kept)
    return None if len(ids) > n_vocab * (1 - _LEAST_SAVED) else ids
