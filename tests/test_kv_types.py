"""The engine with keys and values of other types: what is offered, refused, kept between loads, and told."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from edge_spec import Engine
from edge_spec.backends import kv_scales
from edge_spec.backends._paged_cache import KV_TYPES as OPENVINO_TYPES
from edge_spec.backends.kv_scales import read_scales, write_scales
from edge_spec.backends.onnx import OnnxModel
from edge_spec.errors import UsageError
from edge_spec.export import RECIPES, export_model
from edge_spec.export.reading import read_config
from edge_spec.formats.gguf import GGUFFile
from edge_spec.loading import KV_TYPES
from edge_spec.memory.kv import SUPPORTED_KV
from tests.tiny_models import write_tiny_gguf

PROMPTS = ("def merge", "list of the list of the list", "Is it sorted? Is it in order?")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_tiny_gguf(folder / "target.gguf", n_vocab=512)
    shutil.copy(folder / "target.gguf", folder / "draft.gguf")
    return folder


@pytest.fixture(autouse=True)
def _home(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGE_SPEC_HOME", str(models / "home"))


def test_what_the_engine_offers_is_what_the_backends_take() -> None:
    from edge_spec.backends._llama_context import KV_TYPES as LLAMA_TYPES

    assert set(KV_TYPES["openvino"]) == set(OPENVINO_TYPES)
    assert set(KV_TYPES["llama"]) == set(LLAMA_TYPES)


def test_what_is_estimated_can_be_asked_for() -> None:
    for backend, types in SUPPORTED_KV.items():
        assert set(types) <= set(KV_TYPES[backend])
        assert types[0] == KV_TYPES[backend][0]


@pytest.mark.parametrize("kv", KV_TYPES["llama"])
def test_every_type_of_llama_runs(models: Path, kv: str) -> None:
    from edge_spec.backends import llama

    model = llama.load(models / "target.gguf", name="tiny", n_ctx=64, threads=1, kv=kv)
    assert (model.spec.kv_type, model.spec.can_resize) == (kv, True)
    logits = model.decode(list(range(40)), rows=4).logits
    assert np.isfinite(logits).all()
    assert model.spec.can_evict == (kv != "bf16")
    if model.spec.can_evict:
        model.evict(3, 9)
        assert np.isfinite(model.decode([1, 2, 3]).logits).all()
    model.close()


@pytest.mark.parametrize(
    ("backend", "kv"),
    [("onnx", "f16"), ("onnx", "q8_0"), ("onnx", "u8"), ("native", "q8"), ("openvino", "q8"), ("llama", "q8")],
)
def test_a_type_that_a_backend_does_not_have_is_refused_with_those_it_has(models: Path, backend: str, kv: str) -> None:
    with pytest.raises(UsageError, match=f"the {backend} backend stores .* as {', '.join(KV_TYPES[backend])}"):
        Engine.load(target=models / "target.gguf", drafter="none", backend=backend, kv=kv, threads=1)


def test_a_model_that_falls_back_to_llama_refuses_a_type_of_onnx(tmp_path: Path) -> None:
    odd = write_tiny_gguf(tmp_path / "odd.gguf", n_vocab=512, metadata={"llama.rope.scaling.type": "bogus"})
    with pytest.raises(UsageError, match="the llama backend stores"):
        Engine.load(target=odd, drafter="none", kv="q8", threads=1)


@pytest.mark.parametrize(
    ("backend", "kv", "usual"), [("onnx", "q8", "f32"), ("native", "f32", "f16"), ("native", "f16", "f16")]
)
def test_greedy_text_is_the_same_for_every_drafter_and_the_engine_tells_the_type(
    models: Path, backend: str, kv: str, usual: str
) -> None:
    with Engine.load(
        target=models / "target.gguf", draft=models / "draft.gguf", recipe="int8", backend=backend, kv=kv, threads=1
    ) as engine:
        assert engine.info.kv == kv
        for prompt in PROMPTS:
            plain = engine.generate(prompt, max_tokens=40, drafter="none")
            note = f"keys and values are stored as {kv}: texts may differ from {usual}'s"
            assert (note in plain.notes) == (kv != usual)
            for drafter in ("lookup", "model"):
                assert engine.generate(prompt, max_tokens=40, drafter=drafter).token_ids == plain.token_ids, drafter


@pytest.mark.parametrize(("backend", "usual"), [("onnx", "f32"), ("native", "f16")])
def test_the_usual_type_needs_no_note(models: Path, backend: str, usual: str) -> None:
    for kv in (None, usual):
        with Engine.load(target=models / "target.gguf", drafter="none", backend=backend, kv=kv, threads=1) as engine:
            assert engine.info.kv == usual
            assert not any("keys and values" in note for note in engine.info.notes)


def test_scales_are_measured_once_and_measured_anew_where_they_are_damaged(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGE_SPEC_HOME", str(tmp_path / "home"))
    measured: list[int] = []
    original = kv_scales.measure_scales

    def measure(model: OnnxModel, tokens: Sequence[int]) -> kv_scales.KvScales:
        measured.append(len(tokens))
        return original(model, tokens)

    monkeypatch.setattr(kv_scales, "measure_scales", measure)

    def load() -> None:
        Engine.load(target=models / "target.gguf", drafter="none", kv="q8", threads=1).close()

    load()
    load()
    assert len(measured) == 1
    (kept,) = (tmp_path / "home").rglob("kv_scales/*.npy")
    first = kept.read_bytes()
    kept.write_bytes(first[: len(first) // 2])
    load()
    assert len(measured) == 2
    assert kept.read_bytes() == first


@pytest.mark.parametrize(
    "spoil",
    [
        lambda scales: scales.astype(np.float64),
        lambda scales: scales[:, :1],
        lambda scales: -scales,
        lambda scales: np.where(scales > 0, np.nan, scales).astype(np.float32),
    ],
)
def test_scales_that_do_not_fit_are_no_scales(
    models: Path, tmp_path: Path, spoil: Callable[[kv_scales.KvScales], kv_scales.KvScales]
) -> None:
    with GGUFFile(models / "target.gguf") as gguf:
        config = read_config(gguf)
    scales = np.ones((2, config.n_layer, config.n_kv_head * config.head_dim), np.float32)
    write_scales(tmp_path / "scales.npy", scales)
    kept = read_scales(tmp_path / "scales.npy", config)
    assert kept is not None
    assert np.array_equal(kept, scales)
    write_scales(tmp_path / "scales.npy", spoil(scales))
    assert read_scales(tmp_path / "scales.npy", config) is None


def test_an_8_bit_cache_is_a_quarter_and_its_logits_are_near(tmp_path: Path) -> None:
    source = write_tiny_gguf(tmp_path / "tiny.gguf", n_vocab=512, tensor_type="F16")
    export = export_model(source, RECIPES["int8"], tmp_path / "out", sha256="0" * 64, threads=1)
    tokens = [int(token) for token in np.random.default_rng(3).integers(0, 512, 100)]
    plain = OnnxModel(export, name="tiny", n_ctx=128, threads=1)
    scales = kv_scales.measure_scales(plain, tokens)
    small = OnnxModel(export, name="tiny", n_ctx=128, threads=1, kv_scales=scales)
    assert small.spec.kv_bytes_per_token * 4 == plain.spec.kv_bytes_per_token
    assert small.spec.kv_type == "q8"
    expected, logits = (model.decode(tokens, rows=8).logits.ravel() for model in (plain, small))
    assert np.corrcoef(expected, logits)[0, 1] > 0.995
    keys = [np.abs(keys.astype(int)).max() for keys, _ in small.cached_layers()]
    assert max(keys) <= kv_scales.LEVELS
    plain.close()
    small.close()
