"""Checkpoints through the real optimum, without a hub: `make test-export` (marker `export`).

The environment that the command makes would be fetched; these tests use this Python's own optimum, or the Python that
EDGE_SPEC_OPTIMUM_PYTHON names.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_spec.backends.alignment import find_alignment
from edge_spec.backends.onnx import OnnxModel
from edge_spec.backends.past_present import PastPresentModel
from edge_spec.checkpoint.exporter import GraphExport, export_graph
from edge_spec.checkpoint.folder import open_checkpoint
from edge_spec.engine import Engine
from edge_spec.errors import UnsupportedArchitectureError
from edge_spec.export import RECIPES, export_model
from edge_spec.formats.gguf import GGUFFile
from edge_spec.tokenizer import Tokenizer
from tests.contract import EqualRowsContract, MakeModel
from tests.tiny_checkpoint import tokenizer_json

pytestmark = pytest.mark.export

PYTHON = Path(os.environ.get("EDGE_SPEC_OPTIMUM_PYTHON", sys.executable))

_RANDOM = """
import sys, json, numpy as np, torch, transformers
torch.manual_seed(0)
name, sizes, folder = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
config = transformers.AutoConfig.for_model(name, **sizes)
model = transformers.AutoModelForCausalLM.from_config(config).eval()
for parameter in model.parameters():
    if parameter.ndim == 2:
        torch.nn.init.normal_(parameter, std=0.08)
model.save_pretrained(folder)
tokens = torch.arange(3, 23)[None]
with torch.no_grad():
    np.save(folder + "/logits.npy", model(tokens).logits[0].numpy())
"""

_FROM_GGUF = """
import sys, torch, transformers
from pathlib import Path
source, folder = Path(sys.argv[1]), sys.argv[2]
model = transformers.AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name)
model.config.architectures = [type(model).__name__]
if hasattr(model.config, "quantization_config"):
    del model.config.quantization_config
model.to(torch.bfloat16).save_pretrained(folder)
transformers.AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(folder)
"""

_LOGITS = """
import sys, json, numpy as np, torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
with torch.no_grad():
    np.save(sys.argv[3], model(torch.tensor([json.loads(sys.argv[2])])).logits[0].numpy())
"""

N_VOCAB = 512
SIZES = {
    "gpt_neox": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "opt": {
        "hidden_size": 64,
        "word_embed_proj_dim": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "ffn_dim": 128,
    },
}


def run(script: str, *args: object) -> None:
    done = subprocess.run([PYTHON, "-c", script, *map(str, args)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def random_checkpoint(folder: Path, architecture: str, sizes: Mapping[str, Any]) -> Path:
    shared = {"vocab_size": N_VOCAB, "max_position_embeddings": 128, "bos_token_id": 0, "eos_token_id": 1}
    run(_RANDOM, architecture, json.dumps(shared | dict(sizes)), folder)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_json(N_VOCAB)))
    return folder


@pytest.fixture(scope="module", params=SIZES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param) / request.param
    return random_checkpoint(folder, request.param, SIZES[request.param])


@pytest.fixture(scope="module")
def made(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> GraphExport:
    path = tmp_path_factory.mktemp("out") / "int8"
    return export_graph(open_checkpoint(checkpoint), "0" * 64, RECIPES["int8"], path, lambda: PYTHON, note=print)


def test_logits_are_torch_s(checkpoint: Path, made: GraphExport) -> None:
    expected = np.load(checkpoint / "logits.npy")
    model = PastPresentModel(made, name="tiny", n_ctx=64, threads=1, max_rows=20)
    logits = model.decode(range(3, 23), rows=20).logits
    model.close()
    assert np.corrcoef(logits.ravel(), expected.ravel())[0, 1] > 0.999
    assert (logits.argmax(-1) == expected.argmax(-1)).mean() >= 0.8


class TestContract(EqualRowsContract):
    @pytest.fixture(scope="class")
    @classmethod
    def alignment(cls, made: GraphExport) -> int:
        model = PastPresentModel(made, name="tiny", n_ctx=64, threads=1)
        found = find_alignment(model)
        model.close()
        assert found is not None
        return found

    @pytest.fixture
    def make_model(self, made: GraphExport, alignment: int) -> MakeModel:
        def make(n_ctx: int) -> PastPresentModel:
            model = PastPresentModel(made, name="tiny", n_ctx=n_ctx, threads=1)
            model.align_rows(alignment)
            return model

        return make


def test_an_architecture_that_optimum_does_not_know_is_refused_by_name(checkpoint: Path, tmp_path: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    odd = tmp_path / "odd"
    odd.mkdir()
    for name in ("tokenizer.json", "model.safetensors"):
        (odd / name).symlink_to(checkpoint / name)
    for model_type in ("mystery", "bert"):
        (odd / "config.json").write_text(json.dumps(config | {"model_type": model_type, "vocab_size": N_VOCAB}))
        with pytest.raises(UnsupportedArchitectureError, match=f"'{model_type}'"):
            export_graph(open_checkpoint(odd), "0" * 64, RECIPES["int8"], tmp_path / "out", lambda: PYTHON, note=print)
        assert not (tmp_path / "out").exists()


# Families that our own graph builder takes: torch has the last word on what their checkpoints mean

_DIRECT: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
_DIRECT |= {"intermediate_size": 128, "pad_token_id": 0}
_LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
_SHORT = [1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0]
_LONG = {"type": "longrope", "short_factor": _SHORT, "long_factor": [2 * factor for factor in _SHORT]}
_WIDER = {"hidden_size": 128, "head_dim": 32}
_GEMMA = {"query_pre_attn_scalar": 16, "sliding_window": 8}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"rope_scaling": _LLAMA3 | {"original_max_position_embeddings": 32}, "attention_bias": True},
    "mistral": {"sliding_window": 8},
    "smollm3": {},
    "qwen2": {"rope_scaling": _YARN},
    "qwen3": {},
    "phi3": _WIDER | {"rope_scaling": _LONG, "original_max_position_embeddings": 64, "partial_rotary_factor": 0.5},
    "gemma2": _GEMMA | {"attn_logit_softcapping": 1.5, "final_logit_softcapping": 2.0},
    "gemma3_text": _GEMMA | {"rope_scaling": {"rope_type": "linear", "factor": 8.0}},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_read_without_optimum_means_what_torch_makes_of_it(family: str, tmp_path: Path) -> None:
    folder = random_checkpoint(tmp_path / "checkpoint", family, _DIRECT | FAMILIES[family])
    made = export_model(folder, RECIPES["int8"], tmp_path / "out", sha256="0" * 64, threads=1)
    model = OnnxModel(made, name="tiny", n_ctx=64, threads=1, max_rows=20)
    logits = model.decode(list(range(3, 23)), rows=20).logits.copy()
    model.close()
    expected = np.load(folder / "logits.npy")
    assert np.corrcoef(logits.ravel(), expected.ravel())[0, 1] > 0.999
    assert np.std(logits) == pytest.approx(np.std(expected), rel=0.02)


# A real model


@pytest.fixture(scope="module")
def real_checkpoint(smollm2_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("real") / "checkpoint"
    run(_FROM_GGUF, smollm2_path, folder)
    return folder


@pytest.mark.real
def test_an_export_of_a_real_checkpoint_means_what_torch_makes_of_it(real_checkpoint: Path, tmp_path: Path) -> None:
    """By both ways. The model is too small to be asked much: of France's capital it says L'Étoile, on llama.cpp too."""
    out, checkpoint = tmp_path / "out", open_checkpoint(real_checkpoint)
    ours = export_model(real_checkpoint, RECIPES["int8"], tmp_path / "ours", sha256="0" * 64)
    theirs = export_graph(checkpoint, "0" * 64, RECIPES["int8"], out, lambda: PYTHON, note=print)
    with GGUFFile(theirs.source_file) as gguf:
        tokenizer = Tokenizer.from_gguf(gguf)
    ids = tokenizer.encode("The capital of Italy is Rome. The capital of Spain is Madrid. The capital of France is")
    run(_LOGITS, real_checkpoint, json.dumps(ids), tmp_path / "logits.npy")
    expected = np.load(tmp_path / "logits.npy")
    for model in (
        OnnxModel(ours, name="ours", n_ctx=64, threads=1, max_rows=len(ids)),
        PastPresentModel(theirs, name="theirs", n_ctx=64, threads=1, max_rows=len(ids)),
    ):
        logits = model.decode(ids, rows=len(ids)).logits.copy()
        model.close()
        rows = [np.corrcoef(row, other)[0, 1] for row, other in zip(logits, expected, strict=True)]
        assert min(rows) > 0.99
        assert np.mean(rows) > 0.997
        assert tokenizer.decode([int(logits[-1].argmax())]) == " Paris"


@pytest.mark.real
def test_a_real_checkpoint_speaks_by_either_way(real_checkpoint: Path, tmp_path: Path) -> None:
    ways = [
        export_model(real_checkpoint, RECIPES["int8"], tmp_path / "ours", sha256="0" * 64).path,
        export_graph(
            open_checkpoint(real_checkpoint), "0" * 64, RECIPES["int8"], tmp_path / "out", lambda: PYTHON, note=print
        ).path,
    ]
    for way in ways:
        with Engine.load(target=way, drafter="lookup", n_ctx=256) as engine:
            result = engine.generate("Say hello.", max_tokens=24)
            assert result.text.startswith("Hello")
            assert engine.generate("Say hello.", max_tokens=24, drafter="none").text == result.text
