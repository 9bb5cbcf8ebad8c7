"""The native backend obeys the laws of `CausalLM` for each recipe and architecture, to the bit and without any padding,
on tiny models and a real one; and a pass is what its tokens are one by one, however long it is."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from edge_spec.backends.alignment import ALIGNMENTS, find_alignment
from edge_spec.backends.base import CausalLM
from edge_spec.backends.native import NativeModel
from edge_spec.errors import BackendError, UsageError
from edge_spec.export import RECIPES, Export, Recipe, export_model
from edge_spec.kernels.library import CHUNK
from tests.contract import DROPS, EqualRowsContract, MakeModel, ShallowContract, draw, read
from tests.tiny_models import PECULIARITIES, write_tiny_gguf

TRIMMED = Recipe("trimmed", bits=4, block=128, zero_points=True, head_rows=256)


class NativeModels:
    """How the laws of a suite get their model."""

    recipe: ClassVar[Recipe] = RECIPES["int4"]
    threads: ClassVar[int] = 1
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

    @pytest.fixture
    def make_model(self, export: Export, kernels_dir: Path) -> MakeModel:
        def make(n_ctx: int) -> NativeModel:
            model = NativeModel(
                export, name="tiny", n_ctx=n_ctx, threads=self.threads, kernels_dir=kernels_dir, kv=self.kv
            )
            model.align_rows(1)
            return model

        return make


class NativeContract(NativeModels, EqualRowsContract):
    def test_rows_never_depend_on_the_pass(self, model: CausalLM) -> None:
        assert isinstance(model, NativeModel)
        assert find_alignment(model) == 1

    @pytest.mark.parametrize("rows", [1, 3, 7])
    def test_padding_that_somebody_asks_for_changes_nothing(self, model: CausalLM, rows: int) -> None:
        assert isinstance(model, NativeModel)
        tokens = draw(model, 7)
        expected = model.decode(tokens, rows=rows).logits.copy()
        for alignment in (*ALIGNMENTS, None):
            model.rollback(0)
            model.align_rows(alignment)
            assert np.array_equal(model.decode(tokens, rows=rows).logits, expected), alignment
            assert model.length == 7


class TestInt4(NativeContract):
    pass


class TestInt4OfTwoThreads(NativeContract):
    threads = 2


class TestInt4Accurate(NativeContract):
    recipe = RECIPES["int4-accurate"]


class TestInt8(NativeContract):
    recipe = RECIPES["int8"]


class TestInt8OfTwoThreads(NativeContract):
    recipe = RECIPES["int8"]
    threads = 2


class TestFloats(NativeContract):
    kv = "f32"
    threads = 2


class TestExactQ4(NativeContract):
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


class TestTrimmed(NativeContract):
    """With every token reached; what a trimmed head is not asked for has no logits."""

    recipe = TRIMMED
    threads = 2

    @pytest.fixture
    def make_model(self, export: Export, kernels_dir: Path) -> MakeModel:
        def make(n_ctx: int) -> NativeModel:
            model = NativeModel(export, name="tiny", n_ctx=n_ctx, threads=self.threads, kernels_dir=kernels_dir)
            model.align_rows(1)
            model.reach(range(model.spec.n_vocab))
            return model

        return make


class TestArchitectures(NativeContract):
    """Windows are shorter than the contexts here, so that rolling back and reading again crosses them."""

    threads = 2

    @pytest.fixture(scope="class", params=sorted(PECULIARITIES.keys() - {"llama", "qwen2"}))
    @classmethod
    def source(cls, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
        path = tmp_path_factory.mktemp("source") / "tiny.gguf"
        return write_tiny_gguf(path, architecture=request.param, n_layer=4, n_vocab=512, tensor_type="F16")


class TestEviction(NativeModels, ShallowContract):
    kv = "f32"

    @pytest.fixture(scope="class", params=sorted(PECULIARITIES))
    @classmethod
    def source(cls, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
        path = tmp_path_factory.mktemp("source") / "tiny.gguf"
        return write_tiny_gguf(path, architecture=request.param, n_layer=1, n_vocab=512, tensor_type="F16")

    @pytest.mark.parametrize("drops", DROPS)
    def test_what_was_evicted_might_never_have_been_read(self, model: CausalLM, drops: list[tuple[int, int]]) -> None:
        """Seen in the cache itself: in logits a last bit may tip an activation that is rounded to 8 bits, and then they
        differ by as much as that, here or on the next processor."""
        tokens, more = draw(model, 40), draw(model, 4, seed=1)
        left = list(tokens)
        model.decode(tokens)
        for start, end in drops:
            model.evict(start, end)
            del left[start:end]
        assert isinstance(model, NativeModel)
        cached = [array.copy() for layer in model.cached_layers() for array in layer]
        logits = model.decode(more, rows=4).logits.copy()
        model.rollback(0)
        model.decode(left)
        step = 1e-5 if self.kv == "f32" else 2e-3  # keys that move are rounded again
        for found, array in zip(cached, (array for layer in model.cached_layers() for array in layer), strict=True):
            np.testing.assert_allclose(found, array, rtol=0, atol=step * np.abs(array).max())
        expected = model.decode(more, rows=4).logits
        assert np.corrcoef(logits.ravel(), expected.ravel())[0, 1] > self.alike


class TestEvictionOfHalves(TestEviction):
    kv = "f16"
    alike = 0.999  # those keys are in the logits


@pytest.mark.real
class TestSmolLM2(NativeContract):
    threads = 2

    @pytest.fixture(scope="class")
    @classmethod
    def source(cls, smollm2_path: Path) -> Path:
        return smollm2_path


# Long passes


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Export:
    """A model with windows and soft caps, so that a pass has every kind of step."""
    folder = tmp_path_factory.mktemp("long")
    source = write_tiny_gguf(folder / "tiny.gguf", architecture="gemma2", n_layer=3, n_vocab=512, tensor_type="F16")
    return export_model(source, RECIPES["int4"], folder / "model", sha256="0" * 64, threads=1)


@pytest.fixture(params=[(1, "f32"), (2, "f32"), (2, "f16")], ids=["one thread", "two threads", "halves"])
def model(request: pytest.FixtureRequest, export: Export, kernels_dir: Path) -> Iterator[NativeModel]:
    threads, kv = request.param
    model = NativeModel(export, name="tiny", n_ctx=512, threads=threads, kernels_dir=kernels_dir, kv=kv)
    yield model
    model.close()


@pytest.mark.parametrize("alignment", ALIGNMENTS)
@pytest.mark.parametrize("count", [CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 2 * CHUNK + 70])
def test_a_pass_of_several_chunks_is_what_its_tokens_are_one_by_one(
    model: NativeModel, count: int, alignment: int
) -> None:
    tokens, rows = draw(model, count), model.spec.max_rows
    model.align_rows(alignment)
    whole = model.decode(tokens, rows=rows).logits.copy()
    assert model.length == count
    cached = [array.copy() for layer in model.cached_layers() for array in layer]
    model.align_rows(None)
    model.rollback(0)
    one_by_one = [model.decode([token]).logits[0].copy() for token in tokens]
    assert np.array_equal(whole, one_by_one[-rows:])
    for before, after in zip(cached, (array for layer in model.cached_layers() for array in layer), strict=True):
        assert np.array_equal(before, after)


def test_a_long_pass_behind_a_long_prefix_is_the_same_in_parts_of_any_length(model: NativeModel) -> None:
    tokens = draw(model, 400)
    expected = read(model, tokens)
    for width in (3, 100, CHUNK, CHUNK + 3):
        model.rollback(67)
        for start in range(67, 400, width):
            logits = model.decode(tokens[start : min(start + width, 400)]).logits
        assert np.array_equal(logits, expected), width


@pytest.mark.parametrize("alignment", ALIGNMENTS)
def test_as_many_rows_as_the_spec_promises_can_be_had_of_any_pass(
    export: Export, kernels_dir: Path, alignment: int
) -> None:
    """However many were asked for: a chunk makes no more than it has."""
    model = NativeModel(export, name="tiny", n_ctx=512, threads=1, kernels_dir=kernels_dir, max_rows=3 * CHUNK)
    model.align_rows(alignment)
    rows, tokens = model.spec.max_rows, draw(model, 2 * CHUNK + 1)
    assert CHUNK // 2 <= rows <= CHUNK
    for count in (rows, CHUNK + 1, 2 * CHUNK + 1):
        model.rollback(0)
        logits = model.decode(tokens[:count], rows=rows).logits.copy()
        model.rollback(0)
        assert np.array_equal(logits, [model.decode([token]).logits[0].copy() for token in tokens[:count]][-rows:])
    model.close()


@pytest.mark.parametrize("alignment", ALIGNMENTS)
def test_a_scored_pass_tells_of_every_token_what_its_logits_say(model: NativeModel, alignment: int) -> None:
    model.align_rows(alignment)
    count = model.scored_rows - 3
    tokens = draw(model, count + 1)
    told = model.score(tokens[:-1], tokens[1:])
    model.rollback(0)
    for place, following in enumerate(tokens[1:]):
        logits = model.decode(tokens[place : place + 1]).logits[0].astype(np.float64)
        assert told[place] == pytest.approx(logits[following] - np.log(np.exp(logits).sum()), abs=1e-5)


# What is refused


def test_a_padding_that_was_never_tried_is_refused(model: NativeModel) -> None:
    with pytest.raises(UsageError, match="1, 2, 4"):
        model.align_rows(3)


def test_want_of_memory_is_an_error_with_a_remedy(export: Export, kernels_dir: Path) -> None:
    with pytest.raises(BackendError, match="not enough memory for loading tiny; lower --ctx"):
        NativeModel(export, name="tiny", n_ctx=1 << 50, threads=1, kernels_dir=kernels_dir)


# A team of threads


def test_a_team_meets_however_short_its_passes_are_and_ends_when_the_model_is_closed(
    export: Export, kernels_dir: Path
) -> None:
    def named() -> set[str]:
        return {thread.name for thread in threading.enumerate() if thread.name.startswith("edge_spec")}

    before = named()
    model = NativeModel(export, name="tiny", n_ctx=512, threads=2, kernels_dir=kernels_dir)
    for _ in range(200):
        model.decode([1], rows=0)
        model.rollback(0)
    assert named() > before
    model.close()
    assert named() == before
