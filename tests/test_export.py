"""Laws of the exporter: what it writes means what the source meant, and nothing half-made is ever taken for whole."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_spec.backends.onnx import OnnxModel
from edge_spec.errors import ModelFormatError, StorageError, UnsupportedArchitectureError, UsageError
from edge_spec.export import RECIPES, Recipe, default_recipe, ensure_export, export_model, find_recipe, open_export
from edge_spec.export.finished import SOURCE, WEIGHTS
from edge_spec.export.folder import DESCRIPTION
from edge_spec.export.quantize import dequantize_rows, quantize_rows, repack_exact
from edge_spec.export.reading import read_config
from edge_spec.export.recipe import PROJECTIONS
from edge_spec.export.source import default_recipe_of
from edge_spec.export.stored import read_weights
from edge_spec.formats.gguf import GGUFFile
from edge_spec.formats.gguf_subset import write_subset
from tests.exported_values import exported_values
from tests.reference_decoder import Array, reference_logits
from tests.tiny_models import write_tiny_gguf

SHA = "ab" * 32


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_gguf(tmp_path_factory.mktemp("tiny") / "tiny.gguf", n_vocab=512)


# Quantisation


@pytest.mark.parametrize(("bits", "block"), [(4, 32), (4, 128), (8, 32), (8, 128)])
def test_no_weight_moves_by_more_than_a_step_of_its_block(bits: int, block: int) -> None:
    weights = np.random.default_rng(0).normal(size=(64, 256)).astype(np.float32)
    rows = quantize_rows(weights, bits=bits, block=block)
    steps = np.abs(np.repeat(rows.scales, block, axis=1))
    error = np.abs(dequantize_rows(rows, bits=bits) - weights)
    # Half a step, and up to one for a weight that nearly reaches the largest with the opposite sign.
    assert (error <= steps * 1.0001).all()
    assert (error <= steps * 0.5001).mean() > 0.99


@pytest.mark.parametrize("shift", [1.0, -3.0])
def test_zero_points_follow_a_block_that_does_not_lie_around_zero(shift: float) -> None:
    weights = (np.random.default_rng(0).normal(size=(64, 256)) + shift).astype(np.float32)
    plain, zeroed = (quantize_rows(weights, bits=4, block=64, zero_points=on) for on in (False, True))
    errors = [float(np.square(dequantize_rows(rows, bits=4) - weights).sum()) for rows in (plain, zeroed)]
    assert errors[1] < 0.9 * errors[0]


@pytest.mark.parametrize("zero_points", [False, True])
def test_a_block_of_zeros_stays_zero(zero_points: bool) -> None:
    rows = quantize_rows(np.zeros((2, 64), np.float32), bits=4, block=32, zero_points=zero_points)
    assert not dequantize_rows(rows, bits=4).any()


@pytest.mark.parametrize(("kind", "bits"), [("Q4_0", 4), ("Q8_0", 8)])
def test_the_exact_recipe_carries_every_weight_over_bit_for_bit(kind: str, bits: int, tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "tiny.gguf", tensor_type=kind)
    with GGUFFile(path) as gguf:
        for name in ("blk.0.attn_q.weight", "blk.1.ffn_down.weight", "token_embd.weight"):
            rows = repack_exact(gguf.raw(name), gguf.tensors[name].type)
            assert np.array_equal(dequantize_rows(rows, bits=bits), gguf.dequantize(name))


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0"])
def test_an_exact_export_holds_the_source_values_in_its_file(kind: str, tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "tiny.gguf", tensor_type=kind)
    export = export_model(path, RECIPES["exact"], tmp_path / "out", sha256=SHA)
    with GGUFFile(path) as gguf:
        for name, values in exported_values(export, path):
            assert np.array_equal(values, gguf.dequantize(name)), name
    assert export.requantized == ()


def test_an_exact_export_says_what_it_could_not_carry_over(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "tiny.gguf", tensor_type="Q8_0", tensor_types={"ffn_down": "Q6_K"})
    assert export_model(path, RECIPES["exact"], tmp_path / "out", sha256=SHA).requantized == ("Q6_K",)


# The graph


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
@pytest.mark.parametrize("tied", [True, False])
def test_logits_are_those_of_the_architecture(architecture: str, tied: bool, tmp_path: Path) -> None:
    """Against a plain NumPy forward pass of the same weights, within what int8 activations cost."""
    path = write_tiny_gguf(tmp_path / "tiny.gguf", architecture=architecture, tied=tied, tensor_type="Q8_0")
    model = OnnxModel(
        export_model(path, RECIPES["exact"], tmp_path / "out", sha256=SHA), name="tiny", n_ctx=32, threads=1
    )
    tokens = [int(token) for token in np.random.default_rng(1).integers(0, model.spec.n_vocab, 12)]
    logits = model.decode(tokens, rows=12).logits
    expected = reference_logits(path, tokens)
    assert np.corrcoef(logits.ravel(), expected.ravel())[0, 1] > 0.999
    model.close()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("zero_points", [False, True])
def test_the_runtime_reads_weights_as_they_are_meant(bits: int, zero_points: bool, tmp_path: Path) -> None:
    """Also where a row has an odd number of blocks, whose zero points do not fill their last byte."""
    path = write_tiny_gguf(tmp_path / "tiny.gguf", hidden=160, ff=480, n_head=2, n_kv_head=1)
    recipe = Recipe("x", bits=bits, block=32, zero_points=zero_points)
    model = OnnxModel(export_model(path, recipe, tmp_path / "out", sha256=SHA), name="tiny", n_ctx=32, threads=1)
    tokens = [int(token) for token in np.random.default_rng(1).integers(0, model.spec.n_vocab, 12)]
    logits = model.decode(tokens, rows=12).logits

    def stored(matrix: Array) -> Array:
        rows = quantize_rows(matrix.astype(np.float32), bits=bits, block=32, zero_points=zero_points)
        return dequantize_rows(rows, bits=bits).astype(np.float64)

    assert np.corrcoef(logits.ravel(), reference_logits(path, tokens, stored).ravel())[0, 1] > 0.999
    model.close()


def test_linear_rope_scaling_stretches_positions(tmp_path: Path) -> None:
    scaled = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    with GGUFFile(write_tiny_gguf(tmp_path / "tiny.gguf", metadata=scaled)) as gguf:
        cos, sin = read_config(gguf).rope_inputs(9, 512).values()
    with GGUFFile(write_tiny_gguf(tmp_path / "plain.gguf")) as gguf:
        plain_cos, plain_sin = read_config(gguf).rope_inputs(3, 512).values()
    np.testing.assert_allclose(cos[::4], plain_cos, atol=1e-6)
    np.testing.assert_allclose(sin[::4], plain_sin, atol=1e-6)


# Recipes


def test_rows_take_the_largest_block_that_divides_them() -> None:
    recipe = RECIPES["int4"]
    assert [recipe.block_for(k) for k in (1536, 896, 576, 96)] == [256, 128, 64, 32]


@pytest.mark.parametrize(
    ("kind", "name"), [("Q4_0", "int4"), ("Q4_K", "int4"), ("Q8_0", "int8"), ("Q6_K", "int8"), ("F16", "int8")]
)
def test_the_default_recipe_follows_the_source(kind: str, name: str, tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "tiny.gguf", tensor_type=kind)
    with GGUFFile(path) as gguf:
        assert default_recipe(gguf).name == name
    assert default_recipe_of(path).name == name


def test_an_unknown_recipe_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UsageError, match="int4, int8, exact"):
        find_recipe("int3")
    with pytest.raises(UsageError, match="4 or 8"):
        Recipe("x", bits=3, block=32)
    with pytest.raises(UsageError, match=r"fine=ffn_norm: .*ffn_down, output"):
        Recipe("x", bits=4, block=32, fine=("attn_qkv", "ffn_norm"))


@pytest.mark.parametrize("architecture", ["qwen2", "phi3"])
def test_projections_that_a_recipe_names_get_8_bits_and_no_others_do(architecture: str, tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "tiny.gguf", architecture=architecture)
    recipe = Recipe("x", bits=4, block=32, zero_points=True, fine=("attn_qkv", "output"))
    matrices = read_weights(export_model(path, recipe, tmp_path / "out", sha256=SHA)).matrices
    fine = {name for name, parts in matrices.items() if any(part.bits == 8 for part in parts)}
    assert fine == {"blk.0.attn_qkv", "blk.1.attn_qkv", "output"}
    assert all((part.zeros is None) is (name in fine) for name, parts in matrices.items() for part in parts)
    assert open_export(tmp_path / "out").recipe == recipe


def test_layers_that_a_recipe_names_get_8_bits_counted_from_either_end(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "tiny.gguf", n_layer=4)
    recipe = Recipe("x", bits=4, block=32, fine_layers=(1, -1, 9, -9))  # the last two are of longer models
    matrices = read_weights(export_model(path, recipe, tmp_path / "out", sha256=SHA)).matrices
    fine = {name for name, parts in matrices.items() if parts[0].bits == 8}
    assert fine == {"blk.1.ffn_up", "blk.1.ffn_down", "blk.3.ffn_up", "blk.3.ffn_down"}


def test_8_bits_for_every_projection_are_8_bits(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "tiny.gguf")
    exports = [
        export_model(path, recipe, tmp_path / recipe.name, sha256=SHA)
        for recipe in (Recipe("eight", bits=8, block=64), Recipe("fine", bits=4, block=64, fine=PROJECTIONS))
    ]
    assert exports[0].weights_file.read_bytes() == exports[1].weights_file.read_bytes()


# What cannot be exported


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"general.architecture": "mamba"}, UnsupportedArchitectureError, "llama, .*qwen2, .*gemma3, not 'mamba'"),
        ({"llama.expert_count": 8}, UnsupportedArchitectureError, "mixture of experts"),
        ({"llama.rope.scaling.type": "dynamic"}, UnsupportedArchitectureError, "dynamic"),
        ({"llama.attention.key_length": 40, "llama.attention.value_length": 40}, UnsupportedArchitectureError, "of 16"),
        ({"llama.block_count": 3}, ModelFormatError, "blk.2.attn_norm.weight is missing"),
        ({"llama.block_count": 1}, UnsupportedArchitectureError, "blk.1."),
        ({"llama.feed_forward_length": 1024}, ModelFormatError, "blk.0.ffn_gate.weight has the shape"),
        ({"llama.attention.head_count": 0}, ModelFormatError, "head_count"),
        ({"llama.attention.head_count_kv": 3}, ModelFormatError, "contradict"),
        ({"llama.context_length": None}, ModelFormatError, "llama.context_length is missing"),
    ],
)
def test_what_the_graph_cannot_express_is_refused_by_name(
    change: dict[str, Any], error: type[Exception], says: str, tmp_path: Path
) -> None:
    architecture = change.pop("general.architecture", "llama")
    path = _tiny_of(architecture, tmp_path / "tiny.gguf", change)
    with pytest.raises(error, match=says):
        export_model(path, RECIPES["int4"], tmp_path / "out", sha256=SHA)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["tiny.gguf"], "something half-made was left"


def _tiny_of(architecture: str, path: Path, change: dict[str, Any]) -> Path:
    write_tiny_gguf(path, metadata=change)
    if architecture != "llama":
        path.write_bytes(path.read_bytes().replace(b"llama", architecture.encode(), 1))
    return path


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "tiny.gguf")
    with GGUFFile(path) as gguf:
        offset = gguf.tensors["blk.1.ffn_up.weight"].offset
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(np.float32("nan").tobytes())
    with pytest.raises(ModelFormatError, match=r"blk\.1\.ffn_up\.weight"):
        export_model(path, RECIPES["int4"], tmp_path / "out", sha256=SHA)
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_noticed_before_anything_is_written(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1 << 30, 1 << 30, 1 << 20))
    with pytest.raises(StorageError, match="1 are free"):
        export_model(tiny, RECIPES["int4"], tmp_path / "out", sha256=SHA)
    assert list(tmp_path.iterdir()) == []


# The store's exports


def test_an_export_is_made_once(tiny: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    first = ensure_export(tiny, SHA, RECIPES["int4"], tmp_path, progress=lambda *args: seen.append(args))
    assert seen[-1][0] == seen[-1][1] > 0
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    seen.clear()
    assert ensure_export(tiny, SHA, RECIPES["int4"], tmp_path, progress=lambda *args: seen.append(args)) == first
    assert seen == []


def test_source_recipe_and_exporter_version_each_make_another_export(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = {ensure_export(tiny, SHA, RECIPES[name], tmp_path).path for name in ("int4", "int8")}
    paths.add(ensure_export(tiny, "cd" * 32, RECIPES["int4"], tmp_path).path)
    monkeypatch.setattr("edge_spec.export.finished.EXPORTER_VERSION", 999)
    paths.add(ensure_export(tiny, SHA, RECIPES["int4"], tmp_path).path)
    assert len(paths) == 4


def test_an_export_stands_without_its_source(tiny: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.gguf"
    shutil.copy(tiny, copy)
    export = export_model(copy, RECIPES["int4"], tmp_path / "out", sha256=SHA)
    copy.unlink()
    model = OnnxModel(open_export(export.path), name="tiny", n_ctx=16, threads=1)
    assert np.isfinite(model.decode([1, 2, 3]).logits).all()
    model.close()
    with GGUFFile(tiny) as whole, GGUFFile(export.source_file) as kept:
        assert kept.get_strings("tokenizer.ggml.tokens") == whole.get_strings("tokenizer.ggml.tokens")


@pytest.mark.parametrize("name", [DESCRIPTION, WEIGHTS, SOURCE])
def test_a_damaged_export_is_refused(name: str, tiny: Path, tmp_path: Path) -> None:
    path = export_model(tiny, RECIPES["int4"], tmp_path / "out", sha256=SHA).path
    with (path / name).open("r+b") as file:
        file.truncate(100)
    with pytest.raises(ModelFormatError, match=name):
        open_export(path)


def test_an_export_of_another_version_is_refused(tiny: Path, tmp_path: Path) -> None:
    path = export_model(tiny, RECIPES["int4"], tmp_path / "out", sha256=SHA).path
    described = json.loads((path / DESCRIPTION).read_text())
    (path / DESCRIPTION).write_text(json.dumps(described | {"exporter_version": 0}))
    with pytest.raises(ModelFormatError, match="export it again"):
        open_export(path)


def test_a_folder_that_exists_is_not_written_over(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(UsageError, match="exists already"):
        export_model(tiny, RECIPES["int4"], tmp_path / "out", sha256=SHA)


def test_a_kill_leaves_nothing_that_a_later_run_takes_for_whole(tiny: Path, tmp_path: Path) -> None:
    script = """
import sys, time
from pathlib import Path
from edge_spec.export import RECIPES, ensure_export
def progress(done, total):
    print(done, flush=True)
    time.sleep(60)
ensure_export(Path(sys.argv[1]), sys.argv[2], RECIPES["int4"], Path(sys.argv[3]), progress=progress)
"""
    command = [sys.executable, "-c", script, str(tiny), SHA, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        child.send_signal(signal.SIGKILL)
    left = [path for path in (tmp_path / SHA).iterdir() if path.is_dir()]
    assert [path.suffix for path in left] == [".partial"]
    started = time.monotonic()
    export = ensure_export(tiny, SHA, RECIPES["int4"], tmp_path)
    assert time.monotonic() - started < 30
    assert not any(path.suffix == ".partial" for path in (tmp_path / SHA).iterdir())
    assert open_export(export.path) == export


def test_an_export_of_an_older_exporter_gives_way(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edge_spec.export.finished.EXPORTER_VERSION", 0)
    old = ensure_export(tiny, SHA, RECIPES["int4"], tmp_path).path
    monkeypatch.undo()
    new = ensure_export(tiny, SHA, RECIPES["int4"], tmp_path).path
    assert new.exists()
    assert not old.exists()


# The part of a GGUF that an export keeps


def test_a_subset_has_all_metadata_and_the_named_tensors_unchanged(tiny: Path, tmp_path: Path) -> None:
    names = ["output_norm.weight", "token_embd.weight"]
    with GGUFFile(tiny) as whole:
        write_subset(whole, tmp_path / "part.gguf", names)
        with GGUFFile(tmp_path / "part.gguf") as part:
            assert list(part.metadata) == list(whole.metadata)
            assert list(part.tensors) == names
            for name in names:
                assert np.array_equal(part.raw(name), whole.raw(name))
