"""The native backend runs what the onnx backend runs, to the same logits over several stretches of the cache."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_spec import Engine
from edge_spec.backends import native
from edge_spec.backends.native import NativeModel
from edge_spec.backends.onnx import OnnxModel
from edge_spec.errors import BackendError, BackendUnavailableError, UnsupportedArchitectureError, UsageError
from edge_spec.export import RECIPES, Export, Recipe, export_model
from edge_spec.export.stored import read_weights
from edge_spec.export.traits import SUPPORTED
from edge_spec.kernels import build
from edge_spec.types import Logits, Output
from tests.tiny_models import write_tiny_gguf

N_TOKENS, N_ROWS = 210, 12
"""More than three stretches of 64 keys, and more than a chunk of a pass."""
LINEAR = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
PARTIAL = {"llama.rope.dimension_count": 32}
ODD = {"hidden": 384, "n_head": 6, "ff": 640}
"""Rows of three and of five blocks: scales that fill no whole vector."""
UNEVEN = {"hidden": 96, "n_head": 2, "n_kv_head": 1, "ff": 160}
"""Blocks of 32, heads of 48: not the whole of what is worked on at a time."""
WINDOW = 100
"""Longer than a stretch, and no multiple of one."""


def export(folder: Path, recipe: Recipe = RECIPES["int8"], **options: Any) -> Export:
    source = write_tiny_gguf(folder / "tiny.gguf", **{"n_vocab": 512, "tensor_type": "F16", **options})
    return export_model(source, recipe, folder / "out", sha256="0" * 64, threads=1)


def open_native(made: Export, kernels_dir: Path, **options: Any) -> NativeModel:
    return NativeModel(made, **{"name": "tiny", "n_ctx": 256, "threads": 2, "kernels_dir": kernels_dir, **options})


def last_logits(model: OnnxModel | NativeModel) -> Logits:
    count = min(N_TOKENS, model.spec.n_ctx)
    tokens = [int(token) for token in np.random.default_rng(1).integers(0, model.spec.n_vocab, count)]
    model.decode(tokens[:-N_ROWS], rows=0)
    logits = model.decode(tokens[-N_ROWS:], rows=N_ROWS).logits.copy()
    model.close()
    return logits


def assert_agree(made: Export, kernels_dir: Path, **options: Any) -> None:
    """The same weights, and activations rounded alike, with both types of the cache."""
    context = {"n_ctx": 256, **options}
    theirs = last_logits(OnnxModel(made, name="tiny", threads=1, **context))
    for kv in ("f32", "f16"):
        ours = last_logits(open_native(made, kernels_dir, kv=kv, **context))
        assert np.corrcoef(ours.ravel(), theirs.ravel())[0, 1] > 0.999
        assert np.std(ours) == pytest.approx(np.std(theirs), rel=0.02)


@pytest.mark.parametrize(
    ("recipe", "model"),
    [
        *((RECIPES[name], {}) for name in RECIPES),
        (RECIPES["int4"], ODD),
        (RECIPES["int4"], {**ODD, "n_vocab": 513}),
        (Recipe("short", bits=4, block=32, zero_points=True), UNEVEN),
        (Recipe("shorter rows", bits=4, block=64), UNEVEN),
        (Recipe("fine", bits=4, block=64, zero_points=True, fine=("attn_qkv", "output")), {}),
        (Recipe("shortest", bits=4, block=16, zero_points=True), UNEVEN),
        (Recipe("shortest", bits=8, block=16), UNEVEN),
        (Recipe("zeros", bits=8, block=64, zero_points=True), ODD),
        (RECIPES["int8"], UNEVEN),
        (RECIPES["int8"], {"metadata": LINEAR}),
        (RECIPES["int8"], {"metadata": PARTIAL}),
        (RECIPES["exact"], {"tensor_type": "Q4_0", "tensor_types": {"attn_v": "Q8_0", "ffn_down": "Q6_K"}}),
    ],
    ids=[
        *RECIPES,
        *("odd-blocks", "odd-rows", "uneven-4", "uneven-4-even", "fine", "4-bit-16", "8-bit-16", "8-bit-zeros"),
        *("uneven-8", "linear-rope", "partial-rope", "mixed-exact"),
    ],
)
def test_logits_are_those_of_the_onnx_backend(
    recipe: Recipe, model: dict[str, Any], kernels_dir: Path, tmp_path: Path
) -> None:
    assert_agree(export(tmp_path, recipe, **model), kernels_dir)


@pytest.mark.parametrize("architecture", SUPPORTED)
def test_logits_of_every_architecture_are_those_of_the_onnx_backend_over_long_texts(
    architecture: str, kernels_dir: Path, tmp_path: Path
) -> None:
    n_ctx = 128 if architecture == "mistral3" else 256  # past which it heats its attention
    made = export(tmp_path, architecture=architecture, n_layer=4)
    assert_agree(made, kernels_dir, n_ctx=n_ctx)


@pytest.mark.parametrize("window", [59, 60, 61, 2 * WINDOW])
@pytest.mark.parametrize("head_dim", [272, 528])
def test_large_heads_are_attended_to_in_shorter_stretches(
    head_dim: int, window: int, kernels_dir: Path, tmp_path: Path
) -> None:
    metadata = {
        **{f"gemma2.attention.{name}_length": head_dim for name in ("key", "value")},
        "gemma2.attention.sliding_window": window,
    }
    sizes: dict[str, Any] = {"hidden": 2 * head_dim, "n_head": 2, "n_kv_head": 1, "ff": 64}
    assert_agree(export(tmp_path, architecture="gemma2", metadata=metadata, **sizes), kernels_dir)


@pytest.mark.parametrize("model", [{}, UNEVEN], ids=["whole vectors", "uneven"])
def test_halves_hold_the_same_in_half_the_bytes(model: dict[str, Any], kernels_dir: Path, tmp_path: Path) -> None:
    made, tokens = export(tmp_path, **model), list(range(5, 105))
    whole, half = open_native(made, kernels_dir, kv="f32"), open_native(made, kernels_dir)
    assert (half.spec.kv_type, 2 * half.spec.kv_bytes_per_token) == ("f16", whole.spec.kv_bytes_per_token)
    expected, found = (each.decode(tokens, rows=8).logits.copy() for each in (whole, half))
    assert not np.array_equal(found, expected)
    assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > 0.999
    # The first layer sees nothing of the cache before it writes to it.
    for floats, halves in zip(next(whole.cached_layers()), next(half.cached_layers()), strict=True):
        np.testing.assert_array_equal(halves, floats.astype(np.float16))
    whole.close()
    half.close()


@pytest.mark.parametrize("architecture", ["gemma2", "gemma3"])
@pytest.mark.parametrize("window", [63, 64, 65, WINDOW, 2 * WINDOW])
def test_windows_that_end_within_a_stretch_of_keys_or_at_one(
    architecture: str, window: int, kernels_dir: Path, tmp_path: Path
) -> None:
    metadata = {f"{architecture}.attention.sliding_window": window}
    assert_agree(export(tmp_path, architecture=architecture, metadata=metadata), kernels_dir)


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
def test_the_number_of_threads_changes_no_bit(threads: int, kernels_dir: Path, tmp_path: Path) -> None:
    made = export(tmp_path, RECIPES["int4"], n_head=8, n_kv_head=1)
    for kv in ("f32", "f16"):
        expected = last_logits(open_native(made, kernels_dir, threads=1, kv=kv))
        assert np.array_equal(last_logits(open_native(made, kernels_dir, threads=threads, kv=kv)), expected)


# What is refused


def test_types_of_the_cache_that_are_not_there_are_refused(kernels_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="choose one of f16, f32"):
        open_native(export(tmp_path), kernels_dir, kv="q8")


def test_heads_larger_than_the_kernels_have_room_for_are_refused(
    kernels_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = export(tmp_path)  # 64 numbers
    monkeypatch.setattr(native, "MOST_DIM", 64)
    open_native(made, kernels_dir).close()
    monkeypatch.setattr(native, "MOST_DIM", 63)
    with pytest.raises(UnsupportedArchitectureError, match="heads of 64 numbers; at most 63"):
        open_native(made, kernels_dir)


def test_a_context_past_the_exact_one_is_refused(kernels_dir: Path, tmp_path: Path) -> None:
    made = export(tmp_path, architecture="mistral3")
    with pytest.raises(UsageError, match="up to 128"):
        open_native(made, kernels_dir, n_ctx=129)


def test_without_a_compiler_the_error_has_the_command_that_installs_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGE_SPEC_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(build, "find_spec", lambda name: None)
    monkeypatch.setattr("shutil.which", lambda name: None)
    target = write_tiny_gguf(tmp_path / "target.gguf", n_vocab=512)
    with pytest.raises(BackendUnavailableError, match=r"pip install .*edge-spec\[native\]"):
        Engine.load(target=target, backend="native", drafter="lookup", threads=1)
    assert not list(tmp_path.glob("home/**/weights.bin")), "nothing is exported for a backend that is not there"


@pytest.mark.parametrize("want", Output)
@pytest.mark.parametrize("head_rows", [0, 256], ids=["whole", "trimmed"])
@pytest.mark.parametrize("damage", [("output", 0), ("output", 200), ("output", -1), ("blk.0.ffn_down", 0)])
def test_logits_that_are_not_numbers_do_not_pass_for_numbers(
    damage: tuple[str, int], head_rows: int, want: Output, kernels_dir: Path, tmp_path: Path
) -> None:
    """Those of one token of the head, wherever it stands, too: what is told of the others is no distribution then."""
    made = export(tmp_path, Recipe("plain", bits=4, block=128, zero_points=True, head_rows=head_rows))
    projection, place = damage
    weights = np.fromfile(made.weights_file, np.uint8)
    scales = read_weights(made).matrices[projection][-1].scales
    weights[scales.offset :][: scales.length].view(np.float32)[place or slice(None)] = np.nan
    weights.tofile(made.weights_file)
    native, onnx = open_native(made, kernels_dir), OnnxModel(made, name="tiny", n_ctx=256, threads=1)
    told = [outcome(model, want) for model in (native, onnx)]
    assert told[0] == told[1]


def outcome(model: NativeModel | OnnxModel, want: Output) -> str:
    """What becomes of a decode."""
    try:
        decoded = model.decode([1, 40, 7], want=want)
    except BackendError as exc:
        return str(exc)
    finally:
        model.close()
    logits = decoded.logits if decoded.top is None else decoded.top.logits
    return "numbers" if np.isfinite(logits[0]).any() else "nothing"


def test_an_interrupted_pass_ends_for_all_threads_and_the_model_goes_on(
    tmp_path: Path, kernels_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = open_native(export(tmp_path), kernels_dir, threads=2)
    expected = model.decode([1, 2, 3]).logits.copy()
    model.rollback(0)
    threads = model._program._threads
    take_part = threads._take_part

    def interrupted(*pass_: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            raise KeyboardInterrupt
        take_part(*pass_)

    with monkeypatch.context() as patch:
        patch.setattr(threads, "_take_part", interrupted)
        with pytest.raises(KeyboardInterrupt):
            model.decode([1, 2, 3])
    model.rollback(0)
    np.testing.assert_array_equal(model.decode([1, 2, 3]).logits, expected)
    model.close()


def test_no_more_tokens_are_scored_than_there_is_room_for(tmp_path: Path, kernels_dir: Path) -> None:
    model = open_native(export(tmp_path), kernels_dir)
    for alignment in (1, 2, 4):
        model.align_rows(alignment)
        n = model.scored_rows
        assert len(model.score([1] * n, [2] * n)) == n
        with pytest.raises(UsageError, match="at most"):
            model.score([1] * (n + 1), [2] * (n + 1))
        model.rollback(0)
    model.close()


def test_a_weight_that_is_not_a_number_is_told_of(tmp_path: Path, kernels_dir: Path) -> None:
    made = export(tmp_path)
    part = read_weights(made).matrices["blk.0.ffn_up"][0]
    with made.weights_file.open("r+b") as file:
        file.seek(part.scales.offset + 4 * 3)
        file.write(np.float32(np.nan).tobytes())
    model = open_native(made, kernels_dir)
    assert np.isnan(model.decode([1, 2, 3]).logits).any()
    model.close()
