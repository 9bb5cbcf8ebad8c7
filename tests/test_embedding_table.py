"""An embedding table gives the rows that its file holds, whatever was looked up before."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from edge_spec.backends import embedding_table
from edge_spec.backends.embedding_table import EmbeddingTable
from edge_spec.errors import ModelFormatError
from edge_spec.export import Export, Recipe, export_model
from edge_spec.formats.gguf import GGUFFile
from tests.tiny_models import write_tiny_gguf

N_VOCAB = 640


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Export:
    folder = tmp_path_factory.mktemp("table")
    source = write_tiny_gguf(folder / "tiny.gguf", n_vocab=N_VOCAB, tensor_type="Q8_0")
    return export_model(source, Recipe("fine", bits=8, block=32), folder / "fine", sha256="0" * 64)


@pytest.fixture
def source(export: Export) -> Iterator[GGUFFile]:
    with GGUFFile(export.source_file) as opened:
        yield opened


@pytest.mark.parametrize("n", [1, 2, 16, 17, 100])
def test_rows_are_those_of_the_file_the_first_time_and_again(export: Export, source: GGUFFile, n: int) -> None:
    table, ids = EmbeddingTable(export, source), np.random.default_rng(n).integers(N_VOCAB, size=n)
    expected = source.dequantize("token_embd.weight")[ids]
    for _ in range(2):
        assert np.array_equal(table.rows(ids), expected)


def test_what_a_caller_does_to_its_rows_does_not_come_back(export: Export, source: GGUFFile) -> None:
    table, ids = EmbeddingTable(export, source), np.array([5, 7])
    expected = table.rows(ids).copy()
    table.rows(ids)[:] = 0
    assert np.array_equal(table.rows(ids), expected)


def test_what_a_text_used_lately_is_not_decoded_again(
    export: Export, source: GGUFFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedding_table, "KEPT", 4)
    table, expected = EmbeddingTable(export, source), source.dequantize("token_embd.weight")
    decoded: list[int] = []
    original = source.dequantize

    def counted(name: str, rows: np.ndarray[tuple[int], np.dtype[np.int64]]) -> object:
        decoded.extend(rows.tolist())
        return original(name, rows)

    monkeypatch.setattr(source, "dequantize", counted)
    for ids in ([1, 2, 3], [4, 1], [5, 6, 1], [2], [1]):
        assert np.array_equal(table.rows(np.array(ids)), expected[ids])
    assert decoded == [1, 2, 3, 4, 5, 6, 2]


def test_a_table_of_another_model_is_refused(export: Export, tmp_path: Path) -> None:
    other = write_tiny_gguf(tmp_path / "other.gguf", n_vocab=N_VOCAB + 32)
    with GGUFFile(other) as opened, pytest.raises(ModelFormatError, match="does not fit"):
        EmbeddingTable(export, opened)
