"""Checkpoints through the real optimum, without a hub: `make test-export` (marker `export`).

The environment that the command makes would be fetched; these tests use this Python's own optimum, or the Python that
EDGE_SPEC_OPTIMUM_PYTHON names.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from edge_spec.backends.alignment import find_alignment
from edge_spec.backends.past_present import PastPresentModel
from edge_spec.checkpoint.exporter import GraphExport, export_graph
from edge_spec.checkpoint.folder import open_checkpoint
from edge_spec.engine import Engine
from edge_spec.errors import UnsupportedArchitectureError
from edge_spec.export import RECIPES
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


def random_checkpoint(folder: Path, architecture: str) -> Path:
    shared = {"vocab_size": N_VOCAB, "max_position_embeddings": 128, "bos_token_id": 0, "eos_token_id": 1}
    run(_RANDOM, architecture, json.dumps(shared | SIZES[architecture]), folder)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_json(N_VOCAB)))
    return folder


@pytest.fixture(scope="module", params=SIZES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_checkpoint(tmp_path_factory.mktemp(request.param) / request.param, request.param)


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


@pytest.mark.real
def test_a_checkpoint_of_a_real_model_speaks(smollm2_path: Path, tmp_path: Path) -> None:
    run(_FROM_GGUF, smollm2_path, tmp_path / "checkpoint")
    made = export_graph(
        open_checkpoint(tmp_path / "checkpoint"),
        "0" * 64,
        RECIPES["int8"],
        tmp_path / "out",
        lambda: PYTHON,
        note=print,
    )
    with Engine.load(target=made.path, drafter="lookup", n_ctx=256) as engine:
        text = engine.generate("What is the capital of France?", max_tokens=12).text
    assert "Paris" in text
