"""The openvino backend obeys the laws of `CausalLM`, for each recipe, padded and not, on tiny models and a real one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from edge_spec.backends.alignment import find_alignment
from edge_spec.backends.onnx import OnnxModel
from edge_spec.backends.openvino import OpenVinoModel, _group_notes
from edge_spec.errors import BackendError, UsageError
from edge_spec.export import RECIPES, Export, Recipe, export_model, open_export
from edge_spec.export.stored import read_weights
from edge_spec.formats.gguf import GGUFFile
from edge_spec.types import TOP_K, Output
from tests.contract import CausalLMContract, EqualRowsContract, MakeModel, ShallowContract
from tests.reference_decoder import reference_logits
from tests.test_backend_openvino import EXPRESSED
from tests.tiny_models import write_tiny_gguf

pytestmark = pytest.mark.openvino

TRIMMED = Recipe("trimmed", bits=4, block=128, zero_points=True, head_rows=256)


class OpenVinoModels:
    """How the laws of a suite get their model."""

    recipe: ClassVar[Recipe] = RECIPES["int4"]
    aligned: ClassVar[bool] = True
    kv: ClassVar[str] = "f16"

    @pytest.fixture(scope="class")
    @classmethod
    def source(cls, tmp_path_factory: pytest.TempPathFactory) -> Path:
        """The GGUF to export."""
        return write_tiny_gguf(tmp_path_factory.mktemp("source") / "tiny.gguf", n_vocab=512)

    @pytest.fixture(scope="class")
    @classmethod
    def export(cls, source: Path, tmp_path_factory: pytest.TempPathFactory) -> Export:
        path = tmp_path_factory.mktemp("export") / "model"
        return export_model(source, cls.recipe, path, sha256="0" * 64, threads=1)

    @pytest.fixture(scope="class")
    @classmethod
    def alignment(cls, export: Export) -> int | None:
        if not cls.aligned:
            return None
        model = OpenVinoModel(export, name="tiny", n_ctx=64, threads=1, kv=cls.kv)
        found = find_alignment(model)
        model.close()
        assert found is not None, "no padding makes rows independent of the pass on this processor"
        return found

    @pytest.fixture
    def make_model(self, export: Export, alignment: int | None) -> MakeModel:
        def make(n_ctx: int) -> OpenVinoModel:
            model = OpenVinoModel(export, name="tiny", n_ctx=n_ctx, threads=1, kv=self.kv, park_bytes=8 << 20)
            model.align_rows(alignment)
            return model

        return make


class OpenVinoContract(OpenVinoModels, CausalLMContract):
    pass


class TestInt4(OpenVinoContract, EqualRowsContract):
    pass


class TestInt4Unaligned(OpenVinoContract):
    aligned = False
    atol = 0.2  # a pass of one row goes through another kernel, which rounds otherwise


class TestFloatCache(OpenVinoContract, EqualRowsContract):
    kv = "f32"


class TestByteCache(OpenVinoContract):
    """Keys of a block share their steps, so that a row depends on what was in the pass, and on what was rejected."""

    kv = "u8"
    aligned = False
    atol = 0.5
    traceless = 32


class TestEviction(OpenVinoModels, ShallowContract):
    kv = "f32"

    @pytest.fixture(scope="class", params=EXPRESSED)
    @classmethod
    def source(cls, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
        path = tmp_path_factory.mktemp("source") / "tiny.gguf"
        return write_tiny_gguf(path, architecture=request.param, n_layer=1, n_vocab=512, tensor_type="F16")


class TestArchitectures(OpenVinoContract, EqualRowsContract):
    """Those with norms of heads, layers of windows or without rotation, stretched or local rotary embeddings."""

    @pytest.fixture(scope="class", params=sorted({*EXPRESSED} - {"llama", "qwen2"}))
    @classmethod
    def source(cls, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
        path = tmp_path_factory.mktemp("source") / "tiny.gguf"
        return write_tiny_gguf(path, architecture=request.param, n_layer=4, n_vocab=512, tensor_type="F16")


class TestTrimmed(OpenVinoContract):
    """With every token reached; what a trimmed head is not asked for has no logits."""

    recipe = TRIMMED
    aligned = False
    atol = 0.2

    @pytest.fixture
    def make_model(self, export: Export) -> MakeModel:
        def make(n_ctx: int) -> OpenVinoModel:
            model = OpenVinoModel(export, name="tiny", n_ctx=n_ctx, threads=1)
            model.reach(range(model.spec.n_vocab))
            return model

        return make


class TestInt8(OpenVinoContract, EqualRowsContract):
    recipe = RECIPES["int8"]


class TestExactQ4(OpenVinoContract, EqualRowsContract):
    recipe = RECIPES["exact"]

    @pytest.fixture(scope="class")
    @classmethod
    def source(cls, tmp_path_factory: pytest.TempPathFactory) -> Path:
        return write_tiny_gguf(
            tmp_path_factory.mktemp("source") / "tiny.gguf",
            architecture="qwen2",
            tensor_type="Q4_0",
            tensor_types={"attn_v": "Q8_0", "ffn_down": "Q6_K"},
            tied=False,
        )


@pytest.mark.real
class TestSmolLM2(OpenVinoContract, EqualRowsContract):
    @pytest.fixture(scope="class")
    @classmethod
    def source(cls, smollm2_path: Path) -> Path:
        return smollm2_path


LINEAR = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
PARTIAL = {"llama.rope.dimension_count": 32}
ODD = {"hidden": 384, "n_head": 6, "ff": 640}
"""Rows of three and of five blocks: their 4-bit zero points end within a byte."""


@pytest.mark.parametrize(
    ("recipe", "model"),
    [
        (RECIPES["int4"], {}),
        (RECIPES["int4"], ODD),
        (RECIPES["int4"], {**ODD, "n_vocab": 513}),
        (Recipe("int8 with zero points", bits=8, block=64, zero_points=True), {}),
        (Recipe("fine", bits=4, block=64, zero_points=True, fine=("attn_qkv", "output")), {}),
        (RECIPES["int8"], {"metadata": LINEAR}),
        (RECIPES["int8"], {"metadata": PARTIAL}),
        *((RECIPES["int8"], {"architecture": name, "n_layer": 4}) for name in EXPRESSED),
    ],
    ids=["int4", "odd-blocks", "odd-rows", "int8-zeros", "fine", "linear-rope", "partial-rope", *EXPRESSED],
)
def test_logits_are_those_of_the_onnx_backend(recipe: Recipe, model: dict[str, Any], tmp_path: Path) -> None:
    """The same weights, and activations rounded alike, over more than a block of the cache."""
    path = write_tiny_gguf(tmp_path / "tiny.gguf", **{"n_vocab": 512, "tensor_type": "F16", **model})
    export = export_model(path, recipe, tmp_path / "out", sha256="0" * 64, threads=1)
    tokens = [int(token) for token in np.random.default_rng(1).integers(0, export.config.n_vocab, 48)]
    logits = []
    for kind in (OnnxModel, OpenVinoModel):
        opened = kind(export, name="tiny", n_ctx=64, threads=1)
        opened.decode(tokens[:36], rows=0)
        logits.append(opened.decode(tokens[36:], rows=12).logits.copy())
        opened.close()
    assert np.corrcoef(logits[0].ravel(), logits[1].ravel())[0, 1] > 0.999
    assert np.std(logits[1]) == pytest.approx(np.std(logits[0]), rel=0.02)


def test_a_trimmed_head_gives_its_own_tokens_and_those_it_is_asked_for(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "tiny.gguf", n_vocab=512, tensor_type="F16")
    whole, trimmed = (
        OpenVinoModel(
            export_model(path, recipe, tmp_path / recipe.name, sha256="0" * 64), name="tiny", n_ctx=64, threads=1
        )
        for recipe in (replace(TRIMMED, name="whole", head_rows=0), TRIMMED)
    )
    tokens = [1, 40, 7, 99, 250]
    expected = whole.decode(tokens, rows=3).logits.copy()
    logits = trimmed.decode(tokens, rows=3).logits
    kept = np.isfinite(logits[0])
    assert TRIMMED.head_rows <= kept.sum() <= TRIMMED.head_rows + 3
    np.testing.assert_allclose(logits[:, kept], expected[:, kept], atol=0.05)
    assert (logits[:, ~kept] == -np.inf).all()
    reached = int(np.flatnonzero(~kept)[0])
    trimmed.reach([reached])
    trimmed.rollback(0)
    again = trimmed.decode(tokens, rows=3).logits
    # No further from onnx's than what the head itself scores; how far that is depends on the processor's arithmetic.
    peer = OnnxModel(open_export(tmp_path / "trimmed"), name="tiny", n_ctx=64, threads=1)
    peer.reach([reached])
    scored = np.isfinite(again[0])
    theirs = peer.decode(tokens, rows=3).logits[:, scored]
    distance = np.abs(again[:, scored] - theirs).max(axis=0)
    assert np.corrcoef(again[:, scored].ravel(), theirs.ravel())[0, 1] > 0.999
    assert distance[np.flatnonzero(scored) == reached] <= distance[kept[scored]].max()
    peer.close()
    assert np.isfinite(again).sum() == 3 * (kept.sum() + 1)
    again = again.copy()
    trimmed.rollback(0)
    top = trimmed.decode(tokens, rows=3, want=Output.TOP_K).top
    assert top is not None
    np.testing.assert_array_equal(top.ids, np.argsort(-again, axis=1, kind="stable")[:, :TOP_K])
    np.testing.assert_allclose(top.log_sum, np.log(np.exp(again.astype(np.float64)).sum(axis=1)), rtol=1e-5)
    whole.close()
    trimmed.close()


def test_reached_tokens_are_scored_by_the_rows_of_the_source(tmp_path: Path) -> None:
    """One vector a row of the pass explains the logits of all of them, and is the one that the head reads too."""
    path = write_tiny_gguf(tmp_path / "tiny.gguf", n_vocab=512, tensor_type="F16")
    export = export_model(path, replace(TRIMMED, head_rows=64), tmp_path / "trimmed", sha256="0" * 64)
    head = export.read_head_ids()
    assert head is not None
    reached = np.setdiff1d(np.arange(512), head)
    with GGUFFile(path) as source:
        rows, head_rows = (source.dequantize(export.config.head_tensor, ids) for ids in (reached, head))
    model = OpenVinoModel(export, name="tiny", n_ctx=64, threads=1)
    model.reach(reached.tolist())
    logits = model.decode([1, 40, 7, 99, 250], rows=3).logits.T
    assert len(rows) > rows.shape[1]
    hidden = np.linalg.lstsq(rows, logits[reached], rcond=None)[0]
    np.testing.assert_allclose(rows @ hidden, logits[reached], atol=1e-4)
    assert np.corrcoef((head_rows @ hidden).ravel(), logits[head].ravel())[0, 1] > 0.99
    model.close()


def test_a_trimmed_head_whose_logits_are_not_numbers_is_an_error(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "tiny.gguf", n_vocab=512, tensor_type="F16")
    export = export_model(path, TRIMMED, tmp_path / "trimmed", sha256="0" * 64)
    weights = np.fromfile(export.weights_file, np.uint8)
    head = read_weights(export).matrices["output"][-1]
    weights[head.scales.offset :][:4].view(np.float32)[:] = np.nan
    weights.tofile(export.weights_file)
    model = OpenVinoModel(export, name="tiny", n_ctx=64, threads=1)
    with pytest.raises(BackendError, match="not numbers"):
        model.decode([1, 40, 7], want=Output.TOP_K)
    model.close()


def test_a_cache_whose_rotation_depends_on_the_window_is_turned_where_that_changes(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "tiny.gguf", architecture="phi3", n_layer=1, n_vocab=512, tensor_type="F16")
    export = export_model(path, RECIPES["int8"], tmp_path / "out", sha256="0" * 64, threads=1)
    tokens = [int(token) for token in np.random.default_rng(1).integers(0, 512, 48)]
    logits = []
    for first, then in ((300, 300), (64, 300)):  # its tables change behind 256 tokens
        model = OpenVinoModel(export, name="tiny", n_ctx=first, threads=1)
        model.decode(tokens[:40], rows=0)
        model.resize(then)
        logits.append(model.decode(tokens[40:], rows=8).logits.copy())
        model.close()
    np.testing.assert_allclose(logits[1], logits[0], atol=0.02)
    model = OpenVinoModel(export, name="tiny", n_ctx=64, threads=1, park_bytes=1 << 20)
    model.decode(tokens[:40], rows=0)
    parked = model.park()
    model.rollback(35)  # both go on in the block that they share
    model.decode(tokens[:9], rows=0)
    model.resize(300)
    model.resume(parked)
    np.testing.assert_allclose(model.decode(tokens[40:], rows=8).logits, logits[0], atol=0.02)
    model.close()
    bytes_only = OpenVinoModel(export, name="tiny", n_ctx=64, threads=1, kv="u8")
    assert not bytes_only.spec.can_resize
    bytes_only.close()


def test_activations_are_grouped_by_the_smallest_block_and_mixed_blocks_are_told(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "tiny.gguf", n_vocab=512, tensor_type="Q4_0", tensor_types={"ffn_down": "Q6_K"})
    exact = export_model(path, RECIPES["exact"], tmp_path / "exact", sha256="0" * 64, threads=1)
    even = export_model(path, RECIPES["int4"], tmp_path / "even", sha256="0" * 64, threads=1)
    for export in (exact, even):
        model = OpenVinoModel(export, name="tiny", n_ctx=64, threads=1)
        parts = [part for parts in read_weights(export).matrices.values() for part in parts]
        blocks = {part.block for part in parts}
        assert bool(model.notes) == (len(blocks) > 1)
        model.close()


def test_a_group_larger_than_a_block_is_told() -> None:
    assert _group_notes("tiny", [32], 32) == ()
    assert "groups of 32 for all" in _group_notes("tiny", [32, 64, 128], 32)[0]
    assert "expect slow passes" in _group_notes("tiny", [32, 128], 128)[0]


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
@pytest.mark.parametrize("tied", [True, False])
def test_logits_are_those_of_the_architecture(architecture: str, tied: bool, tmp_path: Path) -> None:
    """Against a plain NumPy forward pass of the same weights, over more than a block of the cache."""
    path = write_tiny_gguf(tmp_path / "tiny.gguf", architecture=architecture, tied=tied, tensor_type="Q8_0")
    export = export_model(path, RECIPES["exact"], tmp_path / "out", sha256="0" * 64, threads=1)
    model = OpenVinoModel(export, name="tiny", n_ctx=64, threads=1)
    tokens = [int(token) for token in np.random.default_rng(1).integers(0, model.spec.n_vocab, 48)]
    model.decode(tokens[:36], rows=0)
    logits = model.decode(tokens[36:], rows=12).logits
    expected = reference_logits(path, tokens)[36:]
    assert np.corrcoef(logits.ravel(), expected.ravel())[0, 1] > 0.999
    model.close()


def test_a_padding_that_was_never_tried_is_refused(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "tiny.gguf", n_vocab=512)
    export = export_model(path, RECIPES["int4"], tmp_path / "out", sha256="0" * 64, threads=1)
    model = OpenVinoModel(export, name="tiny", n_ctx=64, threads=1)
    with pytest.raises(UsageError, match="1, 2, 4"):
        model.align_rows(3)
    model.close()


def test_want_of_memory_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "tiny.gguf", n_vocab=512)
    export = export_model(path, RECIPES["int4"], tmp_path / "out", sha256="0" * 64, threads=1)
    with pytest.raises(BackendError, match="not enough memory for loading tiny; lower --ctx"):
        OpenVinoModel(export, name="tiny", n_ctx=1 << 50, threads=1)
