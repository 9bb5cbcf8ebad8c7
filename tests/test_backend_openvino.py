"""What the openvino backend refuses, and what it says without its library: tested wherever it is installed or not."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edge_spec import Engine
from edge_spec.backends._openvino_limits import check_expressible
from edge_spec.backends.openvino import OpenVinoModel
from edge_spec.errors import BackendUnavailableError, UnsupportedArchitectureError, UsageError
from edge_spec.export import RECIPES, export_model
from edge_spec.export.architecture import DecoderConfig
from edge_spec.export.reading import read_config
from edge_spec.export.traits import SUPPORTED
from edge_spec.formats.gguf import GGUFFile
from tests.tiny_models import write_tiny_gguf

N_CTX = 64
REFUSED = {"gemma2": "a soft cap on attention scores"}
EXPRESSED = ("gemma3", "llama", "mistral3", "phi3", "qwen2", "qwen3", "smollm3")


def config_of(folder: Path, architecture: str = "llama", **options: Any) -> DecoderConfig:
    with GGUFFile(write_tiny_gguf(folder / "tiny.gguf", architecture=architecture, n_vocab=512, **options)) as gguf:
        return read_config(gguf)


def test_every_architecture_is_expressed_or_refused() -> None:
    """A new one has to be put on one of the two lists, and tested."""
    assert {*REFUSED, *EXPRESSED} == set(SUPPORTED)


@pytest.mark.parametrize("architecture", EXPRESSED)
def test_what_the_graph_has_is_expressed(architecture: str, tmp_path: Path) -> None:
    check_expressible(config_of(tmp_path, architecture), "tiny")


@pytest.mark.parametrize("architecture", REFUSED)
def test_what_the_graph_leaves_out_is_refused_by_name(architecture: str, tmp_path: Path) -> None:
    config = config_of(tmp_path, architecture)
    with pytest.raises(UnsupportedArchitectureError) as refused:
        check_expressible(config, "tiny")
    message = str(refused.value)
    assert f"does not run tiny ({architecture})" in message
    assert "the onnx backend runs it" in message
    assert REFUSED[architecture] in message
    check_expressible(replace(config, attention_softcap=0.0), "tiny")


def test_a_model_that_is_refused_is_not_loaded(tmp_path: Path) -> None:
    source = write_tiny_gguf(tmp_path / "tiny.gguf", architecture="gemma2", n_vocab=512)
    export = export_model(source, RECIPES["int4"], tmp_path / "out", sha256="0" * 64, threads=1)
    with pytest.raises(UnsupportedArchitectureError, match="--backend onnx"):
        OpenVinoModel(export, name="tiny", n_ctx=N_CTX, threads=1)


def test_a_context_past_the_exact_one_is_refused(tmp_path: Path) -> None:
    plain_magnitude = {"mistral3.rope.scaling.yarn_log_multiplier": 1.0}
    source = write_tiny_gguf(tmp_path / "tiny.gguf", architecture="mistral3", n_vocab=512, metadata=plain_magnitude)
    export = export_model(source, RECIPES["int4"], tmp_path / "out", sha256="0" * 64, threads=1)
    with pytest.raises(UsageError, match="up to 128"):
        OpenVinoModel(export, name="tiny", n_ctx=129, threads=1)


def test_without_the_library_the_error_has_the_command_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGE_SPEC_HOME", str(tmp_path / "home"))
    monkeypatch.setitem(sys.modules, "openvino", None)
    target = write_tiny_gguf(tmp_path / "target.gguf", n_vocab=512)
    with pytest.raises(BackendUnavailableError, match=r"pip install .*edge-spec\[openvino\]"):
        Engine.load(target=target, backend="openvino", drafter="lookup", threads=1)
    assert not list(tmp_path.glob("home/**/weights.bin")), "nothing is exported for a backend that is not there"
