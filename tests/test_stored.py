"""An export's weights are found again through its graph."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edge_spec.errors import ModelFormatError
from edge_spec.export import RECIPES, Recipe, export_model
from edge_spec.export.layout import plan_layout
from edge_spec.export.stored import give_back, map_weights, read_weights
from edge_spec.formats.gguf import GGUFFile
from tests.tiny_models import write_tiny_gguf


@pytest.mark.parametrize("recipe", list(RECIPES))
def test_every_matrix_and_vector_is_where_the_exporter_put_it(recipe: str, tmp_path: Path) -> None:
    # Values of another type than queries and keys: a projection in two parts.
    source = write_tiny_gguf(
        tmp_path / "tiny.gguf", architecture="qwen2", tensor_type="Q4_0", tensor_types={"attn_v": "Q8_0"}
    )
    export = export_model(source, RECIPES[recipe], tmp_path / "out", sha256="0" * 64, threads=1)
    weights = read_weights(export)
    with GGUFFile(source) as gguf:
        assert weights.matrices == plan_layout(gguf, export.config, export.recipe).matrices
        assert np.array_equal(weights.vectors["output_norm.weight"], gguf.dequantize("output_norm.weight"))
        biases = np.concatenate([gguf.dequantize(f"blk.1.attn_{part}.bias") for part in "qkv"])
        assert np.array_equal(weights.vectors["blk.1.attn_qkv.bias"], biases)


@pytest.mark.parametrize("bits", [4, 8])
def test_zero_points_and_a_trimmed_head_are_found_too(bits: int, tmp_path: Path) -> None:
    source = write_tiny_gguf(tmp_path / "tiny.gguf", n_vocab=512)
    recipe = Recipe("trimmed", bits=bits, block=128, zero_points=True, head_rows=128)
    export = export_model(source, recipe, tmp_path / "out", sha256="0" * 64, threads=1)
    weights = read_weights(export)
    with GGUFFile(source) as gguf:
        assert weights.matrices == plan_layout(gguf, export.config, recipe, export.read_head_ids()).matrices
    assert all(part.zeros is not None for parts in weights.matrices.values() for part in parts)


def test_mapped_weights_read_the_same_after_they_were_given_back(tmp_path: Path) -> None:
    source = write_tiny_gguf(tmp_path / "tiny.gguf", n_vocab=512)
    export = export_model(source, RECIPES["int4"], tmp_path / "out", sha256="0" * 64, threads=1)
    pages = map_weights(export)
    give_back(pages)
    assert bytes(pages) == export.weights_file.read_bytes()
    pages.close()


@pytest.mark.parametrize("content", [b"", b"no graph", b"\x3a\x02\x0a\x00"])
def test_a_graph_that_is_none_of_ours_is_refused(content: bytes, tmp_path: Path) -> None:
    source = write_tiny_gguf(tmp_path / "tiny.gguf", n_vocab=512)
    export = export_model(source, RECIPES["int4"], tmp_path / "out", sha256="0" * 64, threads=1)
    export.model_file.write_bytes(content)
    with pytest.raises(ModelFormatError, match="export it again"):
        read_weights(export)
