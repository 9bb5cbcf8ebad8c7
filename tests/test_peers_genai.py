"""Our exports as onnxruntime-genai wants them: the same logits, from token ids, by ONNX Runtime itself."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from peer_bench.contenders import CONTENDERS
from peer_bench.genai_model import write_genai_model

from edge_spec.backends.onnx import OnnxModel
from edge_spec.export import RECIPES, Export, Recipe, export_model
from tests.tiny_models import write_tiny_gguf


def make_export(folder: Path, recipe: Recipe, architecture: str = "qwen2") -> Export:
    source = write_tiny_gguf(folder / "tiny.gguf", architecture=architecture, n_vocab=512, tensor_type="F16")
    return export_model(source, recipe, folder / recipe.name, sha256="0" * 64, threads=1)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_the_rewritten_graph_gives_our_logits(architecture: str, tmp_path: Path) -> None:
    import onnxruntime as ort

    export = make_export(tmp_path, RECIPES["int4"], architecture)
    (tmp_path / "genai").mkdir()
    write_genai_model(tmp_path / "genai", export, export, n_ctx=64, threads=1, stop_ids={7, 3})
    ids = [int(token) for token in np.random.default_rng(0).integers(0, 512, 12)]
    ours = OnnxModel(export, name="tiny", n_ctx=64, threads=1)
    expected = ours.decode(ids, rows=12).logits.copy()
    ours.close()
    session = ort.InferenceSession(str(tmp_path / "genai/draft/model.onnx"), providers=["CPUExecutionProvider"])
    feeds = {"input_ids": np.array([ids]), "attention_mask": np.ones((1, 12), np.int64)}
    config = export.config
    for value in session.get_inputs():
        if value.name.startswith("past_"):
            feeds[value.name] = np.zeros((1, config.n_kv_head, 0, config.head_dim), np.float32)
    logits = session.run(["logits"], feeds)[0]
    assert logits.shape == (1, 12, 512)
    np.testing.assert_allclose(logits[0], expected, atol=0.05)  # embeddings went through float16


def test_the_description_names_both_graphs_and_their_sizes(tmp_path: Path) -> None:
    export = make_export(tmp_path, RECIPES["int4"])
    (tmp_path / "genai").mkdir()
    write_genai_model(tmp_path / "genai", export, export, n_ctx=64, threads=2, stop_ids={7, 3})
    told = json.loads((tmp_path / "genai/genai_config.json").read_text("utf-8"))
    assert told["model"]["eos_token_id"] == [3, 7]
    assert told["model"]["context_length"] == told["search"]["max_length"] == 64
    for role in ("decoder", "draft"):
        described = told["model"][role]
        assert (tmp_path / "genai" / described["filename"]).is_file()
        assert described["num_key_value_heads"] == export.config.n_kv_head
        assert described["session_options"]["intra_op_num_threads"] == 2


def test_a_trimmed_head_is_refused(tmp_path: Path) -> None:
    export = make_export(tmp_path, Recipe("trimmed", bits=4, block=128, head_rows=256))
    with pytest.raises(ValueError, match="a whole head"):
        write_genai_model(tmp_path, export, None, n_ctx=64, threads=1, stop_ids={3})


def test_the_contenders_are_there_by_mode() -> None:
    assert {"genai-plain", "genai-draft", "genai-ngram"} <= CONTENDERS.keys()
