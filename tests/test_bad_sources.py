"""Laws of exporting what is damaged, or onto a disk that fills up: an error that names the tensor, and nothing left."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_spec.errors import EdgeSpecError, ModelFormatError, UnsupportedArchitectureError
from edge_spec.export import RECIPES, ensure_export, export_model
from edge_spec.export.reading import read_config
from edge_spec.export.traits import SUPPORTED
from edge_spec.formats.ggml import GGMLType
from edge_spec.formats.gguf import GGUFFile
from edge_spec.formats.gguf_writer import NewTensor, write_gguf
from tests.limited import run_limited
from tests.tiny_models import write_tiny_gguf

SHA = "ab" * 32


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With biases, and a head of its own."""
    path = tmp_path_factory.mktemp("tiny") / "tiny.gguf"
    return write_tiny_gguf(path, architecture="qwen2", tied=False, n_vocab=512)


def names_in(path: Path) -> list[str]:
    with GGUFFile(path) as gguf:
        return list(gguf.tensors)


def rewrite(source: Path, path: Path, changed: dict[str, NewTensor | None]) -> Path:
    """`source` with some tensors in another form, or (None) left out."""
    with GGUFFile(source) as gguf:
        metadata: dict[str, Any] = {"general.architecture": gguf.architecture}
        for key in gguf.metadata:
            if isinstance(gguf.metadata[key], int | float | str) and key != "general.architecture":
                metadata[key] = gguf.metadata[key]
        metadata["tokenizer.ggml.tokens"] = gguf.get_strings("tokenizer.ggml.tokens")
        metadata["tokenizer.ggml.merges"] = gguf.get_strings("tokenizer.ggml.merges")
        tensors = [
            changed.get(name, NewTensor(name, info.type, info.shape, partial(gguf.raw, name)))
            for name, info in gguf.tensors.items()
        ]
        write_gguf(path, metadata, [tensor for tensor in tensors if tensor is not None])
    return path


def assert_refused(source: Path, folder: Path, error: type[EdgeSpecError], says: str) -> None:
    for recipe in ("int4", "exact"):
        with pytest.raises(error, match=says):
            export_model(source, RECIPES[recipe], folder / "out", sha256=SHA)
        with pytest.raises(error, match=says):
            ensure_export(source, SHA, RECIPES[recipe], folder / "store")
    assert not (folder / "out").exists()
    assert not [path for path in (folder / "store").rglob("*") if path.name not in ("lock", SHA)]


PARTS = ["token_embd", "output", "output_norm"] + [
    f"blk.1.{part}"
    for part in ("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm", "ffn_gate", "ffn_up", "ffn_down")
]


@pytest.mark.parametrize("part", PARTS)
def test_a_tensor_of_another_shape_is_named(part: str, tiny: Path, tmp_path: Path) -> None:
    name = f"{part}.weight"
    with GGUFFile(tiny) as gguf:
        *rows, last = gguf.tensors[name].shape
    shape = (*rows, last // 2)
    wrong = NewTensor(name, GGMLType.F32, shape, lambda: np.zeros(shape, np.float32))
    assert_refused(rewrite(tiny, tmp_path / "bad.gguf", {name: wrong}), tmp_path, ModelFormatError, name)


@pytest.mark.parametrize("part", [*(f"{part}.weight" for part in PARTS), "blk.0.attn_k.bias"])
def test_a_tensor_of_integers_is_named(part: str, tiny: Path, tmp_path: Path) -> None:
    with GGUFFile(tiny) as gguf:
        shape = gguf.tensors[part].shape
    wrong = NewTensor(part, GGMLType.I32, shape, lambda: np.zeros(shape, np.int32))
    assert_refused(rewrite(tiny, tmp_path / "bad.gguf", {part: wrong}), tmp_path, ModelFormatError, f"{part} holds int")


@pytest.mark.parametrize("part", [part for part in PARTS if part != "output"])
def test_a_missing_tensor_is_named(part: str, tiny: Path, tmp_path: Path) -> None:
    """A missing output.weight is a head that is the embedding table."""
    bad = rewrite(tiny, tmp_path / "bad.gguf", {f"{part}.weight": None})
    assert_refused(bad, tmp_path, ModelFormatError, f"{part}.weight")


@pytest.mark.parametrize("name", ["blk.0.attn_q.bias", "blk.1.attn_v.bias"])
def test_a_bias_that_only_other_layers_have_is_named(name: str, tiny: Path, tmp_path: Path) -> None:
    assert_refused(rewrite(tiny, tmp_path / "bad.gguf", {name: None}), tmp_path, ModelFormatError, name)


@pytest.mark.parametrize("architecture", SUPPORTED)
def test_no_tensor_of_any_architecture_can_be_left_out(architecture: str, tmp_path: Path) -> None:
    source = write_tiny_gguf(tmp_path / "tiny.gguf", architecture=architecture, n_vocab=512)
    for name in names_in(source):
        if name.startswith("rope_factors_long") or (name.startswith("blk.0.") and name.endswith(".bias")):
            continue  # the law of biases is above; one table of two is checked by the other
        bad = rewrite(source, tmp_path / "bad.gguf", {name: None})
        with GGUFFile(bad) as gguf, pytest.raises((ModelFormatError, UnsupportedArchitectureError)) as caught:
            read_config(gguf)
        assert name in str(caught.value)
        bad.unlink()


@pytest.mark.parametrize(
    ("vocab_size", "says"),
    [(511, "vocab_size is 511, and token_embd.weight has 512 rows"), (None, "lists 512 tokens, and .* has 256 rows")],
)
def test_a_vocabulary_that_disagrees_with_the_metadata_is_refused(
    vocab_size: int | None, says: str, tiny: Path, tmp_path: Path
) -> None:
    source = write_tiny_gguf(tmp_path / "odd.gguf", n_vocab=512, metadata={"llama.vocab_size": vocab_size})
    if vocab_size is None:
        rows = NewTensor("token_embd.weight", GGMLType.F32, (256, 256), lambda: np.zeros((256, 256), np.float32))
        source = rewrite(source, tmp_path / "bad.gguf", {"token_embd.weight": rows})
    assert_refused(source, tmp_path, ModelFormatError, says)


@pytest.mark.parametrize("limit", [1 << 12, 1 << 18, 1 << 20])
@pytest.mark.parametrize("into", ["out", "store"])
def test_a_disk_that_fills_up_in_the_middle_leaves_nothing(limit: int, into: str, tmp_path: Path) -> None:
    """At the weights, and at the embedding table behind them."""
    source = write_tiny_gguf(tmp_path / "tiny.gguf", n_vocab=2048)
    body = {
        "out": 'export_model(Path(sys.argv[2]), RECIPES["int4"], Path(sys.argv[3]) / "out", sha256="ab" * 32)',
        "store": 'ensure_export(Path(sys.argv[2]), "ab" * 32, RECIPES["int4"], Path(sys.argv[3]))',
    }
    said = run_limited(
        limit, f"from edge_spec.export import RECIPES, ensure_export, export_model\n{body[into]}", source, tmp_path
    )
    assert said.startswith("StorageError"), said
    assert [path for path in tmp_path.rglob("*") if path.name not in ("lock", SHA)] == [source]


def test_a_disk_that_fills_up_between_two_writes_leaves_nothing(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edge_spec.export import exporter

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(exporter, "write_subset", full)
    with pytest.raises(EdgeSpecError, match=r"No space left on device.*EDGE_SPEC_HOME"):
        ensure_export(tiny, SHA, RECIPES["int4"], tmp_path)
    assert [path.name for path in (tmp_path / SHA).iterdir()] == ["lock"]
    shutil.rmtree(tmp_path / SHA)
