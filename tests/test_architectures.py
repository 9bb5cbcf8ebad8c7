"""Laws of the architectures: an export means what llama.cpp makes of the same file, and what it cannot mean is refused.

On ONNX Runtime and on the native kernels.

The models have random weights, windows of 8 tokens and soft caps that bite, so a part that is left out shows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest

from edge_spec.backends import llama
from edge_spec.backends.base import CausalLM
from edge_spec.backends.native import NativeModel
from edge_spec.backends.onnx import OnnxModel
from edge_spec.errors import ModelFormatError, UnsupportedArchitectureError, UsageError
from edge_spec.export import RECIPES, Export, Recipe, export_model
from edge_spec.export.architecture import DecoderConfig
from edge_spec.export.reading import read_config
from edge_spec.export.traits import SUPPORTED
from edge_spec.formats.gguf import GGUFFile
from edge_spec.types import Logits
from tests.reference_decoder import reference_logits
from tests.tiny_models import PECULIARITIES, write_tiny_gguf

N_TOKENS = 40

Model: TypeAlias = OnnxModel | NativeModel
Open: TypeAlias = Callable[..., AbstractContextManager[Model]]
"""An export and the length of its cache (64), to a model that is closed afterwards."""
ExportedLogits: TypeAlias = Callable[..., Logits]
"""A GGUF and the length of the cache (64), to the logits of every position, [N_TOKENS, n_vocab]."""


def write(path: Path, architecture: str, **options: Any) -> Path:
    """A tiny model that the exact recipe carries over bit for bit."""
    plain = {"tensor_type": "Q8_0", "n_layer": 4, "n_vocab": 512}
    return write_tiny_gguf(path / "tiny.gguf", architecture=architecture, **{**plain, **options})


def export(source: Path, recipe: Recipe = RECIPES["exact"]) -> Export:
    return export_model(source, recipe, source.with_name(recipe.name), sha256="0" * 64, threads=1)


@pytest.fixture(params=["onnx", "native"])
def opened(request: pytest.FixtureRequest, kernels_dir: Path) -> Open:
    kind = OnnxModel if request.param == "onnx" else partial(NativeModel, kernels_dir=kernels_dir)

    @contextmanager
    def opened(made: Export, n_ctx: int = 64) -> Iterator[Model]:
        model = kind(made, name="tiny", n_ctx=n_ctx, threads=1, max_rows=N_TOKENS)
        try:
            yield model
        finally:
            model.close()

    return opened


@pytest.fixture
def exported_logits(opened: Open) -> ExportedLogits:
    def logits(source: Path, n_ctx: int = 64) -> Logits:
        with opened(export(source), n_ctx) as model:
            return model.decode(tokens_of(model), rows=N_TOKENS).logits.copy()

    return logits


def tokens_of(model: CausalLM, seed: int = 1) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(0, model.spec.n_vocab, N_TOKENS)]


def llama_cpp_logits(source: Path, n_ctx: int = 64) -> Logits:
    model = llama.load(source, name="tiny", n_ctx=n_ctx, threads=1, max_rows=N_TOKENS)
    try:
        return model.decode(tokens_of(model), rows=N_TOKENS).logits.copy()
    finally:
        model.close()


def assert_agree(ours: Logits, theirs: Logits) -> None:
    """Equal but for the rounding of activations to eight bits; another token is chosen only where two nearly tie."""
    assert np.corrcoef(ours.ravel(), theirs.ravel())[0, 1] > 0.9995
    assert np.std(ours) == pytest.approx(np.std(theirs), rel=0.01)
    lost = theirs.max(-1) - np.take_along_axis(theirs, ours.argmax(-1)[:, None], -1)[:, 0]
    assert lost.max() < 0.1 * np.std(theirs)
    assert (ours.argmax(-1) == theirs.argmax(-1)).mean() >= 0.8


def config_of(source: Path) -> DecoderConfig:
    with GGUFFile(source) as gguf:
        return read_config(gguf)


def test_every_supported_architecture_is_tested() -> None:
    assert set(PECULIARITIES) == set(SUPPORTED)


# Logits


@pytest.mark.parametrize("architecture", SUPPORTED)
def test_logits_are_llama_cpps(exported_logits: ExportedLogits, architecture: str, tmp_path: Path) -> None:
    source = write(tmp_path, architecture)
    assert_agree(exported_logits(source), llama_cpp_logits(source))


@pytest.mark.parametrize("architecture", sorted(PECULIARITIES.keys() - {"mistral3", "phi3"}))
def test_logits_are_those_of_a_plain_forward_pass(
    exported_logits: ExportedLogits, architecture: str, tmp_path: Path
) -> None:
    source = write(tmp_path, architecture, tied=not architecture.startswith("qwen"))
    ours = exported_logits(source)
    rng = np.random.default_rng(1)
    assert_agree(ours, reference_logits(source, [int(t) for t in rng.integers(0, 512, N_TOKENS)]).astype(np.float32))


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma2", "gemma3"])
def test_heads_can_be_wider_than_their_share_of_the_hidden_width(
    exported_logits: ExportedLogits, architecture: str, tmp_path: Path
) -> None:
    widths = {f"{architecture}.attention.{part}_length": 96 for part in ("key", "value")}
    source = write(tmp_path, architecture, metadata=widths)
    assert_agree(exported_logits(source), llama_cpp_logits(source))


def test_a_cache_past_the_original_context_takes_the_long_rotary_factors(
    exported_logits: ExportedLogits, tmp_path: Path
) -> None:
    source = write(tmp_path, "phi3")
    short, long = exported_logits(source), None
    (tmp_path / "exact").rename(tmp_path / "short")
    long = exported_logits(source, n_ctx=300)
    assert_agree(long, llama_cpp_logits(source, n_ctx=300))
    assert np.corrcoef(long.ravel(), short.ravel())[0, 1] < 0.999


@pytest.mark.parametrize(("architecture", "n_layer"), [("gemma2", 46), ("gemma3", 62)])
def test_the_largest_gemmas_scale_scores_by_the_share_of_the_hidden_width(
    exported_logits: ExportedLogits, architecture: str, n_layer: int, tmp_path: Path
) -> None:
    sizes = {f"{architecture}.attention.{part}_length": 32 for part in ("key", "value")}
    source = write(tmp_path, architecture, n_layer=n_layer, hidden=128, n_head=1, n_kv_head=1, ff=64, metadata=sizes)
    assert config_of(source).attention_scale == pytest.approx(128**-0.5)
    # Rounding adds up over so many layers.
    assert np.corrcoef(exported_logits(source).ravel(), llama_cpp_logits(source).ravel())[0, 1] > 0.99


# Windows


def test_a_window_hides_what_lies_before_it_and_nothing_else(opened: Open, tmp_path: Path) -> None:
    """In a model of one layer, with the window over everything."""
    source = write(tmp_path, "gemma2", n_layer=1)
    with opened(export(source)) as model:
        tokens = tokens_of(model)
        model.align_rows(4)
        expected = model.decode(tokens).logits.copy()
        for hidden, position in ((True, N_TOKENS - 9), (True, 0), (False, N_TOKENS - 8), (False, N_TOKENS - 1)):
            changed = list(tokens)
            changed[position] = (changed[position] + 1) % model.spec.n_vocab
            model.rollback(0)
            assert np.array_equal(model.decode(changed).logits, expected) == hidden, position


@pytest.mark.parametrize("architecture", ["gemma2", "gemma3"])
@pytest.mark.parametrize("window", [1, N_TOKENS - 1, N_TOKENS, N_TOKENS + 1, 4 * N_TOKENS])
def test_windows_shorter_and_longer_than_the_prompt_are_llama_cpps(
    exported_logits: ExportedLogits, architecture: str, window: int, tmp_path: Path
) -> None:
    source = write(tmp_path, architecture, metadata={f"{architecture}.attention.sliding_window": window})
    assert config_of(source).windows == (window, 0, window, 0)
    assert_agree(exported_logits(source), llama_cpp_logits(source))


@pytest.mark.parametrize("architecture", ["gemma2", "gemma3"])
def test_reading_in_parts_across_a_window_is_llama_cpps(opened: Open, architecture: str, tmp_path: Path) -> None:
    """In chunks of 7, with windows of 8, and a rollback behind the window's start."""
    source = write(tmp_path, architecture)
    with opened(export(source)) as model:
        tokens = tokens_of(model)
        model.decode(tokens, rows=0)
        model.rollback(12)
        rows = [model.decode(tokens[at : at + 7], rows=7).logits.copy() for at in range(12, N_TOKENS, 7)]
    assert_agree(np.concatenate(rows), llama_cpp_logits(source)[12:])


@pytest.mark.parametrize("caps", [(0.2, 0.5), (None, None), (50.0, 30.0), (0.5, None)])
def test_soft_caps_are_the_file_s_or_the_architecture_s(
    exported_logits: ExportedLogits, caps: tuple[float | None, ...], tmp_path: Path
) -> None:
    keys = ("gemma2.attn_logit_softcapping", "gemma2.final_logit_softcapping")
    source = write(tmp_path, "gemma2", metadata=dict(zip(keys, caps, strict=True)))
    config = config_of(source)
    assert (config.attention_softcap, config.logit_softcap) == pytest.approx((caps[0] or 50.0, caps[1] or 30.0))
    assert_agree(exported_logits(source), llama_cpp_logits(source))


def test_the_pattern_of_windows_is_the_file_s(tmp_path: Path) -> None:
    def windows(architecture: str, pattern: Any, n_layer: int = 7) -> list[int]:
        key = f"{architecture}.attention.sliding_window_pattern"
        return list(config_of(write(tmp_path, architecture, n_layer=n_layer, metadata={key: pattern})).windows)

    assert windows("gemma2", None) == [8, 0, 8, 0, 8, 0, 8]
    assert windows("gemma3", None) == [8, 8, 8, 8, 8, 0, 8]
    assert windows("gemma3", 3) == [8, 8, 0, 8, 8, 0, 8]
    assert windows("gemma3", [True, False, False, True], n_layer=4) == [8, 0, 0, 8]
    with pytest.raises(ModelFormatError, match="sliding_window_pattern is for 4 layers, not 5"):
        windows("gemma3", [True, False, False, True], n_layer=5)


def test_a_gemma3_without_windows_has_one_rotary_embedding(exported_logits: ExportedLogits, tmp_path: Path) -> None:
    source = write(tmp_path, "gemma3", metadata={"gemma3.attention.sliding_window": None})
    assert config_of(source).rope_names == ["cos", "sin"]
    assert_agree(exported_logits(source), llama_cpp_logits(source))


# What the parts make together


def test_tokens_that_a_trimmed_head_is_asked_for_have_bounded_logits_too(opened: Open, tmp_path: Path) -> None:
    source = write(tmp_path, "gemma2")
    recipes = Recipe("whole", bits=8, block=32), Recipe("trimmed", bits=8, block=32, head_rows=128)
    with opened(export(source, recipes[0])) as whole, opened(export(source, recipes[1])) as trimmed:
        trimmed.reach(range(512))
        expected = whole.decode(tokens_of(whole)).logits
        np.testing.assert_allclose(trimmed.decode(tokens_of(whole)).logits, expected, atol=0.05)


def test_the_fields_of_a_decoder_survive_the_export(tmp_path: Path) -> None:
    for architecture in SUPPORTED:
        config = config_of(write(tmp_path, architecture))
        assert DecoderConfig.from_json(config.to_json()) == config
    with pytest.raises(ModelFormatError, match="'mamba'"):
        DecoderConfig.from_json(config.to_json() | {"architecture": "mamba"})


# What cannot be exported


@pytest.mark.parametrize(
    ("architecture", "change", "error", "says"),
    [
        ("qwen3", {"rope.scaling.type": "dynamic"}, UnsupportedArchitectureError, "dynamic"),
        ("qwen3", {"rope.freq_base": 0.0}, ModelFormatError, "contradict"),
        ("gemma3", {"rope.dimension_count": 2**31}, ModelFormatError, "contradict"),
        ("gemma3", {"block_count": 2**31}, ModelFormatError, "layers, but only"),
        ("qwen3", {"rope.scaling.factor": -2.0}, ModelFormatError, "factor of -2"),
        ("mistral3", {"rope.scaling.yarn_ext_factor": 0.5}, UnsupportedArchitectureError, "YaRN"),
        ("mistral3", {"rope.scaling.yarn_beta_slow": 0.0}, ModelFormatError, "YaRN"),
        ("mistral3", {"rope.scaling.original_context_length": 0}, ModelFormatError, "context of 0 tokens"),
        ("phi3", {"rope.dimension_count": 32}, ModelFormatError, "rope_factors_short.weight does not fit 32"),
        ("phi3", {"rope.dimension_count": 40}, UnsupportedArchitectureError, "40 rotary dimensions"),
        ("gemma2", {"rope.freq_base_swa": 5000.0}, UnsupportedArchitectureError, "rotary embedding of their own"),
        ("gemma2", {"final_logit_softcapping": -1.0}, ModelFormatError, "final_logit_softcapping"),
        ("gemma3", {"rope.scaling.attn_factor": 1.5}, UnsupportedArchitectureError, "rotary embedding of their own"),
        ("gemma3", {"expert_count": 4}, UnsupportedArchitectureError, "mixture of experts"),
    ],
)
def test_what_the_graph_cannot_express_is_refused_by_name(
    architecture: str, change: dict[str, Any], error: type[Exception], says: str, tmp_path: Path
) -> None:
    keys = {f"{architecture}.{key}": value for key, value in change.items()}
    with pytest.raises(error, match=says):
        config_of(write(tmp_path, architecture, metadata=keys))


@pytest.mark.parametrize(
    ("written", "read_as", "error", "says"),
    [
        (b"llama", b"qwen3", ModelFormatError, r"blk\.0\.attn_q_norm\.weight is missing"),
        (b"qwen3", b"llama", UnsupportedArchitectureError, r"no use for the tensor blk\.0\.attn_q_norm\.weight"),
        (b"llama", b"phi33", UnsupportedArchitectureError, "phi33"),
        (b"gemma3", b"gemma2", UnsupportedArchitectureError, r"no use for the tensor blk\.0\.attn_q_norm\.weight"),
        (b"gemma2", b"gemma3", ModelFormatError, r"blk\.0\.attn_q_norm\.weight is missing"),
    ],
)
def test_an_architecture_s_tensors_have_to_be_its_own(
    written: bytes, read_as: bytes, error: type[Exception], says: str, tmp_path: Path
) -> None:
    source = write(tmp_path, written.decode())
    source.write_bytes(source.read_bytes().replace(written, read_as))
    with pytest.raises(error, match=says):
        config_of(source)


def test_a_context_past_the_exact_one_is_refused(opened: Open, tmp_path: Path) -> None:
    """Mistral 3 heats its attention past the original context, which the graph does not."""
    made = export(write(tmp_path, "mistral3"))
    assert (made.config.n_ctx_exact, made.config.n_ctx_train) == (128, 512)
    with pytest.raises(UsageError, match="up to 128"), opened(made, n_ctx=129):
        pass
