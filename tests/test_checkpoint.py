"""Laws of exporting checkpoints by way of optimum, with a hand-written graph in optimum's place."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from edge_spec.backends.past_present import PastPresentModel
from edge_spec.checkpoint import exporter, optimum_child
from edge_spec.checkpoint.environment import find_python
from edge_spec.checkpoint.exporter import GraphExport, ensure_graph_export, export_graph, open_graph_export
from edge_spec.checkpoint.folder import open_checkpoint
from edge_spec.checkpoint.graph import quantize_graph
from edge_spec.checkpoint.optimum import run_optimum
from edge_spec.engine import Engine
from edge_spec.errors import (
    BackendError,
    BackendUnavailableError,
    EdgeSpecError,
    ModelFormatError,
    ModelNotFoundError,
    StorageError,
    UnsupportedArchitectureError,
    UsageError,
)
from edge_spec.export import RECIPES
from edge_spec.export.folder import DESCRIPTION
from edge_spec.formats.safetensors import SafetensorsFile
from edge_spec.store import Store
from tests.limited import run_limited
from tests.tiny_checkpoint import (
    N_LAYER,
    N_VOCAB,
    tokenizer_json,
    write_checkpoint,
    write_optimum_graph,
    write_safetensors,
)

SHA = "ab" * 32
TOKENS = [int(token) for token in np.random.default_rng(1).integers(0, N_VOCAB, 20)]


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_optimum_graph(tmp_path_factory.mktemp("graph") / "model.onnx")


@pytest.fixture
def checkpoint(tmp_path: Path, graph: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(exporter, "run_optimum", lambda _, __, folder: shutil.copy(graph, folder / "model.onnx"))
    return write_checkpoint(tmp_path / "checkpoint")


def export(checkpoint: Path, to: Path, recipe: str = "int8") -> GraphExport:
    return export_graph(open_checkpoint(checkpoint), SHA, RECIPES[recipe], to, lambda: Path("python"), note=print)


def float_logits(graph: Path) -> Any:
    session = ort.InferenceSession(str(graph))
    past = {i.name: np.zeros((1, i.shape[1], 0, i.shape[3]), np.float32) for i in session.get_inputs()[3:]}
    ids = {"input_ids": np.array([TOKENS]), "position_ids": np.arange(len(TOKENS))[None]}
    return session.run(["logits"], past | ids | {"attention_mask": np.ones((1, len(TOKENS)), np.int64)})[0][0]


# The graph


def test_an_export_means_what_optimum_s_graph_means(checkpoint: Path, graph: Path, tmp_path: Path) -> None:
    model = PastPresentModel(export(checkpoint, tmp_path / "out"), name="tiny", n_ctx=64, threads=1, max_rows=20)
    ours, theirs = model.decode(TOKENS, rows=20).logits, float_logits(graph)
    model.close()
    assert np.corrcoef(ours.ravel(), theirs.ravel())[0, 1] > 0.999
    assert np.std(ours) == pytest.approx(np.std(theirs), rel=0.01)


def test_every_product_with_a_constant_is_quantised_and_stored_once(checkpoint: Path, tmp_path: Path) -> None:
    made = export(checkpoint, tmp_path / "out", "int4")
    model = onnx.load(str(made.model_file), load_external_data=False)
    kinds = [node.op_type for node in model.graph.node]
    assert kinds.count("MatMulNBits") == 4 * N_LAYER + 1
    assert kinds.count("Gemm") == 0
    stored = {tensor.name: tensor for tensor in model.graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT}
    assert not any(
        len(tensor.dims) == 2 and not name.endswith(".scales") for name, tensor in stored.items() if "wpe" not in name
    )
    assert sorted(p.name for p in made.path.iterdir()) == [DESCRIPTION, "model.onnx", "source.gguf", "weights.bin"]


def test_logits_are_made_for_the_rows_that_are_asked_for(checkpoint: Path, tmp_path: Path) -> None:
    made = export(checkpoint, tmp_path / "out")
    names = [value.name for value in ort.InferenceSession(str(made.model_file)).get_inputs()]
    assert "rows" in names


def test_matrices_that_do_not_divide_into_blocks_stay_as_they_are(tmp_path: Path) -> None:
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    matrix = onnx.numpy_helper.from_array(np.ones((10, 8), np.float32), "odd")
    source = write_optimum_graph(tmp_path / "model.onnx")
    model = onnx.load(str(source))
    model.graph.initializer.append(matrix)
    model.graph.node.append(helper.make_node("MatMul", ["odd.in", "odd"], ["odd.out"]))
    model.graph.output.append(helper.make_tensor_value_info("odd.out", kind, [1, 8]))
    model.graph.node.append(
        helper.make_node("Constant", [], ["odd.in"], value=onnx.numpy_helper.from_array(np.ones((1, 10), np.float32)))
    )
    onnx.save(model, str(source))
    quantize_graph(source, tmp_path / "out.onnx", tmp_path / "weights.bin", RECIPES["int4"])
    kinds = [node.op_type for node in onnx.load(str(tmp_path / "out.onnx"), load_external_data=False).graph.node]
    assert kinds.count("MatMulNBits") == 4 * N_LAYER + 1


def test_a_graph_of_another_layout_is_refused_by_what_it_lacks(graph: Path, tmp_path: Path) -> None:
    model = onnx.load(str(graph))
    del model.graph.output[1]
    onnx.save(model, str(tmp_path / "model.onnx"))
    with pytest.raises(UnsupportedArchitectureError, match=r"no present\.0\.key"):
        quantize_graph(tmp_path / "model.onnx", tmp_path / "out", tmp_path / "weights", RECIPES["int4"])


@pytest.mark.parametrize("recipe", ["exact", "draft"])
def test_a_recipe_that_takes_a_gguf_is_refused(recipe: str, checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"the recipe {recipe} takes a GGUF"):
        export(checkpoint, tmp_path / "out", recipe)


# The store


def test_an_export_of_a_checkpoint_is_made_once(checkpoint: Path, tmp_path: Path) -> None:
    asked: list[int] = []

    def find() -> Path:
        asked.append(1)
        return Path("python")

    made = [
        ensure_graph_export(open_checkpoint(checkpoint), SHA, RECIPES["int4"], tmp_path / "exports", find, note=print)
        for _ in range(2)
    ]
    assert made[0] == made[1] == open_graph_export(made[0].path)
    assert asked == [1]
    (made[0].path / "weights.bin").write_bytes(b"cut")
    again = ensure_graph_export(
        open_checkpoint(checkpoint), SHA, RECIPES["int4"], tmp_path / "exports", find, note=print
    )
    assert again == made[0]
    assert asked == [1, 1]


def test_the_hash_of_a_checkpoint_follows_its_files(checkpoint: Path, tmp_path: Path) -> None:
    hashes = [open_checkpoint(checkpoint).sha256(tmp_path / "cache")]
    (checkpoint / "chat_template.jinja").write_text("{{ messages }}")
    hashes.append(open_checkpoint(checkpoint).sha256(tmp_path / "cache"))
    write_safetensors(checkpoint / "model.safetensors", {"wte": ("F32", np.ones((4, 4)))})
    hashes.append(open_checkpoint(checkpoint).sha256(tmp_path / "cache"))
    assert len(set(hashes)) == 3


def test_the_engine_runs_a_checkpoint_that_was_exported(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGE_SPEC_HOME", str(tmp_path / "home"))
    with pytest.raises(ModelNotFoundError, match=f"edge-spec export {checkpoint}"):
        Engine.load(target=checkpoint, drafter="lookup")
    store = Store()
    opened = open_checkpoint(checkpoint)
    made = ensure_graph_export(
        opened, opened.sha256(store.cache_dir), RECIPES["int4"], store.exports_dir, lambda: Path("python"), note=print
    )
    texts = []
    for target in (checkpoint, made.path):
        with Engine.load(target=target, drafter="lookup", n_ctx=96, threads=1) as engine:
            result = engine.generate("the list the list", max_tokens=24)
            texts.append(result.text)
            assert (result.recipe, result.backend, result.generated_tokens) == ("int4", "onnx", 24)
            assert engine.generate("the list the list", max_tokens=24, drafter="none").text == result.text
    assert texts[0] == texts[1]
    with pytest.raises(UsageError, match="the llama backend runs GGUF files"):
        Engine.load(target=made.path, drafter="lookup", backend="llama")


# What cannot be exported


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"config": {"vocab_size": N_VOCAB - 1}}, f"lists {N_VOCAB} tokens, and the model knows {N_VOCAB - 1}"),
        ({"config": {"vocab_size": N_VOCAB + 8}}, f"gives {N_VOCAB} logits, and vocab_size says {N_VOCAB + 8}"),
        ({"config": {"vocab_size": "many"}}, "vocab_size is 'many', not a count"),
        ({"config": {"model_type": None}}, "names no model_type"),
        ({"config": {"max_position_embeddings": None}}, "no max_position_embeddings"),
        ({"tokenizer": {"model": {"type": "BPE"}}}, "lists no tokens"),
        ({"tokenizer": {"version": "1.0"}}, "it has no model"),
    ],
)
def test_what_contradicts_itself_is_refused_with_the_reason(
    change: dict[str, Any], says: str, graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporter, "run_optimum", lambda _, __, folder: shutil.copy(graph, folder / "model.onnx"))
    source = write_checkpoint(tmp_path / "checkpoint", **change)
    with pytest.raises(ModelFormatError, match=says):
        export(source, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint"], "something half-made was left"


def test_a_tokenizer_of_an_unknown_kind_is_refused_by_name(checkpoint: Path, tmp_path: Path) -> None:
    plain = tokenizer_json() | {"decoder": {"type": "WordPiece"}, "pre_tokenizer": {"type": "Whitespace"}}
    (checkpoint / "tokenizer.json").write_text(json.dumps(plain))
    with pytest.raises(UnsupportedArchitectureError, match="'BPE'"):
        export(checkpoint, tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "says"),
    [("tokenizer.json", "AutoTokenizer"), ("model.safetensors", "save_pretrained"), ("config.json", "cannot be read")],
)
def test_a_part_that_is_missing_is_named_with_a_remedy(name: str, says: str, checkpoint: Path) -> None:
    (checkpoint / name).unlink()
    with pytest.raises(ModelFormatError, match=says):
        open_checkpoint(checkpoint)


def test_a_tensor_that_the_index_promises_is_named_if_it_is_missing(checkpoint: Path, tmp_path: Path) -> None:
    index = {"weight_map": {"wte": "model.safetensors", "layers.7.weight": "model.safetensors"}}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelFormatError, match=r"layers\.7\.weight is missing from model\.safetensors"):
        export(checkpoint, tmp_path / "out")
    index["weight_map"]["layers.7.weight"] = "other.safetensors"
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelFormatError, match=r"other\.safetensors is missing"):
        open_checkpoint(checkpoint)


def test_weights_that_are_not_finite_are_named(checkpoint: Path, graph: Path, tmp_path: Path) -> None:
    model = onnx.load(str(graph))
    tensor = next(t for t in model.graph.initializer if t.name == "layer.1.up")
    values = onnx.numpy_helper.to_array(tensor).copy()
    values[3, 4] = np.nan
    tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    onnx.save(model, str(tmp_path / "model.onnx"))
    with pytest.raises(ModelFormatError, match=r"layer\.1\.up holds values that are not finite"):
        quantize_graph(tmp_path / "model.onnx", tmp_path / "out", tmp_path / "weights", RECIPES["int4"])


# Safetensors


@pytest.mark.parametrize(
    ("header", "says"),
    [
        ({"a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 12]}}, "the tensor a of the shape"),
        ({"a": {"dtype": "F7", "shape": [3], "data_offsets": [0, 12]}}, "the tensor a is of the type 'F7'"),
        ({"a": {"dtype": "F32", "shape": [8], "data_offsets": [0, 32]}}, "the tensor a ends behind the file's end"),
        ({"a": {"dtype": "F32", "shape": [-3], "data_offsets": [0, 12]}}, r"the tensor a has the shape \(-3,\)"),
        (
            {
                "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
                "b": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]},
            },
            "the tensor b overlaps",
        ),
        ({"a": {"dtype": "F32", "shape": [3]}}, "not a safetensors header"),
        ([], "not a safetensors header"),
    ],
)
def test_a_damaged_safetensors_file_is_refused_with_the_tensor(header: Any, says: str, tmp_path: Path) -> None:
    text = json.dumps(header).encode()
    (tmp_path / "a.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(12))
    with pytest.raises(ModelFormatError, match=says):
        SafetensorsFile(tmp_path / "a.safetensors")


@pytest.mark.parametrize("content", [b"", b"\xff" * 8, b"\x05\0\0\0\0\0\0\0{}", b"\x01\0\0\0\0\0\0\0{"])
def test_what_is_no_safetensors_file_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(ModelFormatError, match=r"a\.safetensors"):
        SafetensorsFile(tmp_path / "a.safetensors")


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_safetensors_values_are_read_as_floats(dtype: str, tmp_path: Path) -> None:
    values = np.arange(-4, 4, dtype=np.float32).reshape(2, 4)
    stored = (values.view(np.uint32) >> 16).astype(np.uint16) if dtype == "BF16" else values
    with SafetensorsFile(write_safetensors(tmp_path / "a.safetensors", {"x": (dtype, stored)})) as file:
        assert np.array_equal(file.values("x"), values)
        assert (file.tensors["x"].shape, file.tensors["x"].n_values) == ((2, 4), 8)


# Optimum's process


def fake_child(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, body: str) -> Callable[[Path], Path]:
    script = tmp_path / "child.py"
    script.write_text(f"import os, sys, pathlib\n{body}\n")
    monkeypatch.setattr(optimum_child, "__file__", str(script))
    return lambda source: run_optimum(open_checkpoint(source), Path(sys.executable), tmp_path)


@pytest.mark.parametrize(
    ("body", "error", "says"),
    [
        ("print('no such model', file=sys.stderr); sys.exit(3)", UnsupportedArchitectureError, "'gpt_tiny' .no such"),
        ("print('OSError: No space left on device', file=sys.stderr); sys.exit(1)", StorageError, "No space left"),
        ("os.kill(os.getpid(), 9)", BackendError, "ran out of memory"),
        ("print('boom', file=sys.stderr); sys.exit(1)", BackendError, "boom"),
        ("sys.exit(0)", BackendError, "exit code 0"),
    ],
)
def test_what_stops_optimum_is_told_in_our_terms(
    body: str,
    error: type[EdgeSpecError],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(error, match=says):
        fake_child(monkeypatch, tmp_path, body)(write_checkpoint(tmp_path / "checkpoint"))


def test_optimum_gets_no_network_and_a_pipe_that_ends_with_us(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body = (
        "out = pathlib.Path(sys.argv[2])\n"
        "assert os.environ['HF_HUB_OFFLINE'] == '1'\n"
        "(out / 'model.onnx').write_text(sys.argv[1])"
    )
    source = write_checkpoint(tmp_path / "checkpoint")
    assert fake_child(monkeypatch, tmp_path, body)(source).read_text() == str(source)


def test_a_python_without_optimum_is_refused_with_what_to_install() -> None:
    with pytest.raises(BackendUnavailableError, match=r"optimum-onnx.*--optimum-python"):
        find_python(Path("/nowhere/python"))


def test_this_python_is_taken_if_it_has_optimum(monkeypatch: pytest.MonkeyPatch) -> None:
    installed: set[str] = set()

    def version(name: str) -> str:
        if name not in installed:
            raise metadata.PackageNotFoundError(name)
        return "1"

    monkeypatch.setattr(metadata, "version", version)
    assert find_python(None) is None
    installed |= {"optimum-onnx", "torch"}
    assert find_python(None) == Path(sys.executable)


# A disk that is full, a process that is killed


@pytest.mark.parametrize("limit", [1 << 14, 1 << 16, 1 << 17])
def test_a_disk_that_fills_up_in_the_middle_leaves_nothing(limit: int, graph: Path, tmp_path: Path) -> None:
    """At the weights, and at the metadata behind them."""
    source = write_checkpoint(tmp_path / "checkpoint")
    body = """
from edge_spec.checkpoint import exporter, open_checkpoint
from edge_spec.export import RECIPES
exporter.run_optimum = lambda *_: Path(sys.argv[4])
source, out = open_checkpoint(Path(sys.argv[2])), Path(sys.argv[3]) / "out"
exporter.export_graph(source, "0" * 64, RECIPES["int4"], out, lambda: Path("x"), note=lambda _: None)
"""
    said = run_limited(limit, body, source, tmp_path, graph)
    assert said.startswith("StorageError"), said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint"]


def test_a_kill_in_the_middle_leaves_nothing_that_is_taken_for_whole(tmp_path: Path, graph: Path) -> None:
    source = write_checkpoint(tmp_path / "checkpoint")
    script = """
import sys, time
from pathlib import Path
from edge_spec.checkpoint import exporter, open_checkpoint
from edge_spec.export import RECIPES
exporter.run_optimum = lambda *_: Path(sys.argv[3])
def progress(done, total):
    print(done, flush=True)
    time.sleep(60)
exporter.ensure_graph_export(open_checkpoint(Path(sys.argv[1])), "ab" * 32, RECIPES["int8"], Path(sys.argv[2]),
                             lambda: Path("x"), note=lambda _: None, progress=progress)
"""
    command = [sys.executable, "-c", script, str(source), str(tmp_path / "exports"), str(graph)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        child.send_signal(signal.SIGKILL)
    left = [path for path in (tmp_path / "exports" / SHA).iterdir() if path.is_dir()]
    assert [path.suffix for path in left] == [".partial"]
    started = time.monotonic()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exporter, "run_optimum", lambda *_: graph)
        made = ensure_graph_export(
            open_checkpoint(source), SHA, RECIPES["int8"], tmp_path / "exports", lambda: Path("x"), note=print
        )
    assert time.monotonic() - started < 30
    assert [path for path in (tmp_path / "exports" / SHA).iterdir() if path.is_dir()] == [made.path]
