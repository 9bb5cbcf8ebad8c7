from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edge_spec.errors import ModelFormatError
from edge_spec.export import correct
from edge_spec.export.calibration import MAX_TOKENS, calibration_texts
from edge_spec.export.correct import Array, Run, correction, quantize_corrected, runs_of
from edge_spec.export.exporter import Export, _vectors, ensure_export, export_key, export_model, open_export
from edge_spec.export.forward import Forward
from edge_spec.export.quantize import QuantizedRows, dequantize_rows, quantize_rows
from edge_spec.export.reading import read_config
from edge_spec.export.recipe import RECIPES, Recipe
from edge_spec.formats.gguf import GGUFFile
from tests.reference_decoder import reference_logits
from tests.tiny_models import PECULIARITIES, write_tiny_gguf

INT4 = Recipe("corrected", bits=4, block=128, zero_points=True, corrected=True)


def _corrections(inputs: Array, block: int) -> list[Run]:
    return [correction(inputs, run) for run in runs_of(inputs.shape[1], block)]


def _correlated(seed: int, tokens: int, width: int, rank: int) -> Array:
    """Inputs as a network's are: few directions carry most of them."""
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(7).normal(size=(rank, width))
    return (rng.normal(size=(tokens, rank)) @ mixing + 0.3 * rng.normal(size=(tokens, width))).astype(np.float32)


def _weights(n_rows: int, width: int) -> Array:
    return np.random.default_rng(3).normal(size=(n_rows, width)).astype(np.float32)


def _loss(inputs: Array, weights: Array, stored: Array) -> float:
    return float(np.square(inputs @ (stored - weights).T).sum())


@pytest.mark.parametrize("zero_points", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_correction_lowers_the_error_of_products_on_the_text_it_read_and_on_another(
    bits: int, zero_points: bool
) -> None:
    weights, inputs, others = _weights(48, 256), _correlated(0, 512, 256, 24), _correlated(1, 512, 256, 24)
    nearest = dequantize_rows(quantize_rows(weights, bits=bits, block=64, zero_points=zero_points), bits=bits)
    rows = quantize_corrected(weights, _corrections(inputs, 64), bits=bits, block=64, zero_points=zero_points)
    corrected = dequantize_rows(rows, bits=bits)
    assert (rows.zeros is None) is not zero_points
    for shown in (inputs, others):
        assert _loss(shown, weights, corrected) < 0.6 * _loss(shown, weights, nearest)


def test_inputs_that_have_nothing_in_common_leave_nothing_to_correct() -> None:
    weights = _weights(16, 128)
    runs = _corrections(np.eye(128, dtype=np.float32), 64)
    corrected = dequantize_rows(quantize_corrected(weights, runs, bits=8, block=64, zero_points=True), bits=8)
    assert np.abs(corrected - weights).max() < 0.02  # half a step: no column carries another one's error


def test_the_factor_is_that_of_the_inverse_of_the_damped_second_moments() -> None:
    inputs = _correlated(0, 300, 160, 20)
    (run,) = _corrections(inputs, 32)
    moments = inputs.T.astype(np.float64) @ inputs
    moments += np.eye(160) * correct.DAMPING * moments.diagonal().mean()
    assert np.array_equal(run.factor, np.triu(run.factor))
    np.testing.assert_allclose(run.factor.T @ run.factor @ moments, np.eye(160), atol=2e-3)


def test_a_wide_matrix_is_cut_into_runs_of_whole_blocks_that_cover_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(correct, "RUN_COLUMNS", 100)
    runs = _corrections(_correlated(0, 64, 320, 8), 32)
    assert [run.start for run in runs] == [0, 64, 160, 224]
    assert runs[-1].start + len(runs[-1].factor) == 320
    weights = _weights(8, 320)
    rows = quantize_corrected(weights, runs, bits=4, block=32, zero_points=True)
    assert np.abs(dequantize_rows(rows, bits=4) - weights).max() < 1.5


def test_inputs_that_are_all_zero_are_no_obstacle() -> None:
    weights = _weights(4, 64)
    runs = _corrections(np.zeros((10, 64), np.float32), 32)
    rows = quantize_corrected(weights, runs, bits=8, block=32, zero_points=True)
    assert np.abs(dequantize_rows(rows, bits=8) - weights).max() < 0.05


@pytest.mark.parametrize("architecture", sorted(PECULIARITIES))
def test_layers_are_those_of_the_reference_decoder(architecture: str, tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "tiny.gguf", architecture=architecture)
    texts = [[5, 9, 40, 7, 200, 31, 8, 8, 99, 120, 3, 17], [60, 61, 2]]
    with GGUFFile(path) as gguf:
        config = read_config(gguf)
        forward = Forward(config, _vectors(gguf, config), [len(text) for text in texts])
        x = forward.embed(gguf.dequantize("token_embd.weight", np.concatenate([np.array(t) for t in texts])))
        for layer in range(config.n_layer):
            block = f"blk.{layer}."
            matrices = {
                name.removeprefix(block).removesuffix(".weight"): gguf.dequantize(name)
                for name, tensor in gguf.tensors.items()
                if name.startswith(block) and len(tensor.shape) == 2
            }
            if "attn_q" in matrices:
                matrices["attn_qkv"] = np.concatenate([matrices[f"attn_{part}"] for part in "qkv"])
            x = forward.layer(layer, x, matrices).output
        logits = forward.norm("output_norm", x) @ gguf.dequantize(config.head_tensor).T
    if config.logit_softcap:
        logits = config.logit_softcap * np.tanh(logits / config.logit_softcap)
    if architecture in ("mistral3", "phi3"):  # their rotary scaling is beyond the reference; llama.cpp's cache is f16
        np.testing.assert_allclose(logits, np.concatenate([_llama_logits(path, text) for text in texts]), atol=0.02)
    else:
        expected = np.concatenate([reference_logits(path, text) for text in texts])
        np.testing.assert_allclose(logits, expected, atol=2e-4)


def _llama_logits(path: Path, tokens: list[int]) -> Array:
    from edge_spec.backends import llama

    with closing(llama.load(path, name="tiny", n_ctx=256, threads=1)) as model:
        return model.decode(tokens, rows=len(tokens)).logits.copy()


def _differences(export: Export, gguf: Path) -> dict[str, float]:
    """Squared error of the stored head and of a feed-forward matrix, over the weights' own squares."""
    from edge_spec.export.stored import read_weights

    weights, data = read_weights(export), np.fromfile(export.weights_file, np.uint8)
    found = {}
    with GGUFFile(gguf) as source:
        for name, tensor in (("output", "token_embd.weight"), ("blk.1.ffn_down", "blk.1.ffn_down.weight")):
            (part,) = weights.matrices[name]
            blocks = part.row_length // part.block
            packed = data[part.packed.offset : part.packed.offset + part.packed.length].reshape(part.n_rows, blocks, -1)
            scales = data[part.scales.offset : part.scales.offset + part.scales.length].view(np.float32)
            assert part.zeros is not None
            zeros = data[part.zeros.offset : part.zeros.offset + part.zeros.length].reshape(part.n_rows, -1)
            low_high = np.stack([zeros & 15, zeros >> 4], -1).reshape(part.n_rows, -1)[:, :blocks]
            rows = QuantizedRows(packed, scales.reshape(part.n_rows, blocks), low_high)
            values = source.dequantize(tensor)
            found[name] = float(np.square(dequantize_rows(rows, bits=4) - values).sum() / np.square(values).sum())
    return found


def test_a_corrected_export_is_still_the_same_weights_and_says_what_it_read(tmp_path: Path) -> None:
    gguf = write_tiny_gguf(tmp_path / "tiny.gguf")
    made = export_model(gguf, INT4, tmp_path / "export", sha256="0" * 64)
    assert 256 <= made.n_calibration_tokens <= MAX_TOKENS
    assert open_export(tmp_path / "export") == made
    assert all(difference < 0.03 for difference in _differences(made, gguf).values())


def test_a_corrected_export_is_the_same_every_time(tmp_path: Path) -> None:
    gguf = write_tiny_gguf(tmp_path / "tiny.gguf", architecture="qwen2")
    made = [
        export_model(gguf, INT4, tmp_path / str(threads), sha256="0" * 64, threads=threads).weights_file.read_bytes()
        for threads in (1, 2, 3)
    ]
    assert made[0] == made[1] == made[2]


def test_progress_of_a_corrected_export_counts_every_byte_once(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    gguf = write_tiny_gguf(tmp_path / "tiny.gguf")
    export_model(gguf, INT4, tmp_path / "export", sha256="0" * 64, progress=lambda *report: seen.append(report))
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1]
    assert seen[-2][0] == seen[-1][1]


def test_a_source_whose_tokenizer_is_not_known_is_rounded_to_nearest_and_says_so(tmp_path: Path) -> None:
    gguf = write_tiny_gguf(tmp_path / "tiny.gguf", metadata={"tokenizer.ggml.model": "bert"})
    made = export_model(gguf, INT4, tmp_path / "corrected", sha256="0" * 64)
    nearest = export_model(gguf, replace(INT4, corrected=False), tmp_path / "nearest", sha256="0" * 64)
    assert made.n_calibration_tokens == 0
    assert made.weights_file.read_bytes() == nearest.weights_file.read_bytes()


def test_texts_are_no_longer_than_the_window(tmp_path: Path) -> None:
    with GGUFFile(write_tiny_gguf(tmp_path / "tiny.gguf", n_ctx=64)) as gguf:
        texts = calibration_texts(gguf, 64, 1000)
        assert max(map(len, texts)) == 64
        assert calibration_texts(gguf, 64, 100) == []  # ids that the model does not know


def test_a_model_that_overflows_on_the_text_is_refused_by_tensor(tmp_path: Path) -> None:
    gguf = write_tiny_gguf(tmp_path / "tiny.gguf")
    with GGUFFile(gguf) as source:
        gains = source.tensors["blk.1.ffn_norm.weight"]
    data = bytearray(gguf.read_bytes())
    data[gains.offset : gains.offset + gains.n_bytes] = np.full(gains.n_elements, 3e38, np.float32).tobytes()
    gguf.write_bytes(data)
    with pytest.raises(ModelFormatError, match=r"blk\.1\."):
        export_model(gguf, INT4, tmp_path / "export", sha256="0" * 64)
    assert not (tmp_path / "export").exists()


def test_a_recipe_that_corrects_nothing_keeps_the_key_that_its_exports_have() -> None:
    keys = {export_key(recipe) for recipe in RECIPES.values()}
    assert len(keys) == len(RECIPES)
    assert export_key(RECIPES["draft"]) == "1d41ea32"


def test_exporting_an_unchanged_source_again_reads_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gguf = write_tiny_gguf(tmp_path / "tiny.gguf")
    first = ensure_export(gguf, "0" * 64, INT4, tmp_path / "exports")
    monkeypatch.setattr("edge_spec.export.exporter.export_model", None)
    assert ensure_export(gguf, "0" * 64, INT4, tmp_path / "exports") == first
