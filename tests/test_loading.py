"""From a name to a source."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_spec.errors import ModelFormatError
from edge_spec.loading import find_source
from edge_spec.store import Store
from tests.gguf_builder import TensorSpec, write_gguf
from tests.vocabularies import bpe_metadata


def write_model(path: Path, n_rows: int) -> Path:
    rows = TensorSpec("token_embd.weight", (32, n_rows), 0, bytes(4 * 32 * n_rows))
    return write_gguf(path, bpe_metadata() | {"qwen2.context_length": 64}, [rows])


def test_a_model_without_a_row_for_each_token_is_refused(tmp_path: Path) -> None:
    n_vocab = len(bpe_metadata()["tokenizer.ggml.tokens"])
    store = Store(tmp_path / "home")
    with pytest.raises(ModelFormatError, match=f"lists {n_vocab} tokens, and the model knows {n_vocab - 1}"):
        find_source(store, write_model(tmp_path / "narrow.gguf", n_vocab - 1))
    wider = find_source(store, write_model(tmp_path / "wider.gguf", n_vocab + 9))
    assert wider.tokenizer.n_vocab == n_vocab


def test_a_draft_of_the_same_vocabulary_shares_the_tokenizer(tmp_path: Path) -> None:
    store, n_vocab = Store(tmp_path / "home"), 300
    target = find_source(store, write_model(tmp_path / "target.gguf", n_vocab))
    draft = find_source(store, write_model(tmp_path / "draft.gguf", n_vocab + 9), share=target.tokenizer)
    assert draft.tokenizer is target.tokenizer
