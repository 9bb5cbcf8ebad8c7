"""A trimmed head gives the logits that the whole head gives, for the tokens that it keeps or was asked for.

On ONNX Runtime and on the native kernels.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TypeAlias

import numpy as np
import pytest

from edge_spec.backends import embedding_table, trimmed_head
from edge_spec.backends.alignment import find_alignment
from edge_spec.backends.native import NativeModel
from edge_spec.backends.onnx import OnnxModel
from edge_spec.decoding import Session, SpeculativeDecoder
from edge_spec.drafting import ModelDrafter, Request
from edge_spec.errors import BackendError, ModelFormatError
from edge_spec.export import Export, Recipe, export_model, open_export
from edge_spec.export.trim import head_ids
from edge_spec.formats.gguf import GGUFFile
from edge_spec.memory import runtime
from edge_spec.types import TOP_K, Output, SamplingParams
from tests.tiny_models import write_tiny_gguf

N_VOCAB, HEAD_ROWS = 640, 300
TOKENS = [1, 40, 7, 99, 250]

Model: TypeAlias = OnnxModel | NativeModel
Open: TypeAlias = Callable[[Export], Model]


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "tiny.gguf"
    return write_tiny_gguf(path, n_vocab=N_VOCAB, tied=request.param, tensor_type="F16")


@pytest.fixture(scope="module")
def exports(source: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Export, Export]:
    """The same model with its whole head and with a trimmed one."""
    folder = tmp_path_factory.mktemp("exports")
    recipes = Recipe("whole", bits=8, block=32), Recipe("trimmed", bits=8, block=32, head_rows=HEAD_ROWS)
    whole, trimmed = (export_model(source, recipe, folder / recipe.name, sha256="0" * 64) for recipe in recipes)
    return whole, trimmed


@pytest.fixture(params=["onnx", "native"])
def open_model(request: pytest.FixtureRequest, kernels_dir: Path) -> Open:
    kind = OnnxModel if request.param == "onnx" else partial(NativeModel, kernels_dir=kernels_dir)
    return lambda export: kind(export, name="tiny", n_ctx=64, threads=1)


@pytest.fixture
def models(open_model: Open, exports: tuple[Export, Export]) -> Iterator[tuple[Model, Model]]:
    whole, trimmed = (open_model(export) for export in exports)
    yield whole, trimmed
    whole.close()
    trimmed.close()


def test_the_head_keeps_the_first_ids_and_every_control_token(source: Path, exports: tuple[Export, Export]) -> None:
    ids = exports[1].read_head_ids()
    assert ids is not None
    with GGUFFile(source) as gguf:
        names = gguf.get_strings("tokenizer.ggml.tokens")
    control = [names.index(name) for name in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")]
    assert set(ids) == {*range(HEAD_ROWS), *control}
    assert exports[1].weight_bytes < exports[0].weight_bytes
    assert exports[0].read_head_ids() is None


def test_a_head_that_would_lose_little_is_left_whole(source: Path) -> None:
    with GGUFFile(source) as gguf:
        assert head_ids(gguf, N_VOCAB, N_VOCAB - 10) is None
        assert head_ids(gguf, N_VOCAB, 0) is None


def test_kept_tokens_have_their_logits_and_the_others_none(models: tuple[Model, Model]) -> None:
    whole, trimmed = (model.decode(TOKENS, rows=3).logits.copy() for model in models)
    kept = np.isfinite(trimmed[0])
    assert HEAD_ROWS <= kept.sum() <= HEAD_ROWS + 3
    assert trimmed.shape == whole.shape == (3, N_VOCAB)
    np.testing.assert_allclose(trimmed[:, kept], whole[:, kept], atol=1e-5)
    assert (trimmed[:, ~kept] == -np.inf).all()


def test_tokens_that_are_reached_have_theirs_too(models: tuple[Model, Model]) -> None:
    whole, trimmed = models
    reached = [500, 600, 501, 3]
    trimmed.reach(reached)
    trimmed.reach([500])
    expected, logits = whole.decode(TOKENS, rows=2).logits, trimmed.decode(TOKENS, rows=2).logits
    np.testing.assert_allclose(logits[:, reached], expected[:, reached], atol=0.05)
    assert logits[0, 502] == -np.inf


@pytest.mark.parametrize("reached", [[], [500], list(range(400, 600))])
def test_the_top_k_are_those_of_what_can_be_reached(
    models: tuple[Model, Model], exports: tuple[Export, Export], reached: list[int]
) -> None:
    _, trimmed = models
    trimmed.reach(reached)
    logits = trimmed.decode(TOKENS, rows=3).logits.copy()
    trimmed.rollback(0)
    top = trimmed.decode(TOKENS, rows=3, want=Output.TOP_K).top
    assert top is not None
    assert np.array_equal(top.ids, np.argsort(-logits, axis=1, kind="stable")[:, :TOP_K])
    np.testing.assert_array_equal(top.logits, np.take_along_axis(logits, top.ids, axis=1))
    np.testing.assert_allclose(top.log_sum, np.log(np.exp(logits.astype(np.float64)).sum(axis=1)), rtol=1e-5)
    kept = exports[1].read_head_ids()
    assert kept is not None
    assert np.isin(top.ids, [*kept, *reached]).all()


def test_past_the_limit_earlier_tokens_are_forgotten(
    models: tuple[Model, Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trimmed_head, "MAX_REACHED", 4)
    _, trimmed = models
    trimmed.reach([500, 501, 502])
    trimmed.decode(TOKENS)
    trimmed.reach([510, 511])
    logits = trimmed.decode(TOKENS).logits[0]
    assert np.isfinite(logits[[510, 511]]).all()
    assert (logits[[500, 501, 502]] == -np.inf).all()
    top = trimmed.decode(TOKENS, want=Output.TOP_K).top
    assert top is not None
    assert not np.isin(top.ids, [500, 501, 502]).any()


def test_another_text_reaches_its_own_tokens_alone(models: tuple[Model, Model]) -> None:
    _, trimmed = models
    trimmed.reach(range(400, 500))
    trimmed.decode(TOKENS)
    for reached in ([510, 511], []):
        trimmed.reach(reached, anew=True)
        trimmed.rollback(0)
        logits = trimmed.decode(TOKENS).logits[0].copy()
        assert set(np.flatnonzero(np.isfinite(logits))) - {*range(HEAD_ROWS)} >= set(reached)
        assert not np.isfinite(logits[400:500]).any()
        trimmed.rollback(0)
        top = trimmed.decode(TOKENS, want=Output.TOP_K).top
        assert top is not None
        assert np.array_equal(top.ids[0], np.argsort(-logits, kind="stable")[:TOP_K])


def test_a_draft_does_not_depend_on_what_was_drafted_before(open_model: Open, exports: tuple[Export, Export]) -> None:
    def drafts(*earlier: list[int]) -> list[int]:
        drafter = ModelDrafter(Session(open_model(exports[1])))
        for prompt in (*earlier, TOKENS):
            sampling = SamplingParams(temperature=1.5, seed=3)
            request = Request(
                sampling=sampling,
                rng=np.random.default_rng(3),
                prompt_length=len(prompt),
                max_length=60,
                n_vocab=N_VOCAB,
            )
            drafter.start(request)
            found = drafter.propose(prompt, 3).tokens
        drafter.close()
        return found

    assert drafts([*range(400, 440)]) == drafts() == drafts([*range(500, 520)], [*range(600, 630)])


def test_tokens_reached_one_by_one_score_as_those_reached_at_once(
    open_model: Open, exports: tuple[Export, Export]
) -> None:
    one, all_ = (open_model(exports[1]) for _ in range(2))
    for token in range(400, 600):  # past the room that there is at first, more than once
        one.reach([token])
        if token % 40 == 0:
            one.decode(TOKENS, want=Output.TOP_K)
            one.rollback(0)
    all_.reach(range(400, 600))
    found, expected = (model.decode(TOKENS, rows=2).logits for model in (one, all_))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.isfinite(found[:, 400:600]).all()
    one.close()
    all_.close()


@pytest.mark.parametrize("between", ["score", "align", "reach"])
def test_a_pass_is_the_same_after_what_changes_where_rows_go(models: tuple[Model, Model], between: str) -> None:
    for model in models:
        for want in Output:
            model.rollback(0)
            model.reach([600])
            before = model.decode(TOKENS, rows=3, want=want)
            expected = (before.logits if before.top is None else before.top.logits).copy()
            model.rollback(0)
            if between == "score":
                model.score(TOKENS[:3], TOKENS[1:4])
            elif between == "align":
                model.align_rows(2)
                model.decode(TOKENS[:1], rows=1, want=want)
                model.align_rows(None)
            else:
                model.reach([3])  # the head has it
            model.rollback(0)
            after = model.decode(TOKENS, rows=3, want=want)
            found = after.logits if after.top is None else after.top.logits
            np.testing.assert_array_equal(found, expected)


def test_the_plan_knows_how_much_is_kept() -> None:
    assert runtime.REACHED_ROWS == trimmed_head.MAX_REACHED
    assert runtime.KEPT_EMBEDDINGS == embedding_table.KEPT


def test_a_trimmed_draft_changes_nothing_that_is_written(open_model: Open, exports: tuple[Export, Export]) -> None:
    def write(drafter: ModelDrafter | None) -> list[int]:
        target = open_model(exports[0])
        target.align_rows(2)
        decoder = SpeculativeDecoder(Session(target), drafter)
        tokens = [token for step in decoder.generate(TOKENS, max_tokens=40) for token in step.tokens]
        assert drafter is None or decoder.stats.accepted > 0
        target.close()
        return tokens

    draft = open_model(exports[1])
    assert write(ModelDrafter(Session(draft))) == write(None)
    draft.close()


def test_damaged_head_ids_are_refused(exports: tuple[Export, Export], tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(exports[1].path, copy)
    n_bytes = (copy / "head_ids.npy").stat().st_size
    (copy / "head_ids.npy").write_bytes(b"x" * n_bytes)
    with pytest.raises(ModelFormatError, match="export it again"):
        open_export(copy).read_head_ids()


def test_a_scored_pass_tells_of_every_token_what_single_passes_tell(models: tuple[Model, Model]) -> None:
    _, trimmed = models
    tokens = [int(token) for token in np.random.default_rng(3).integers(0, N_VOCAB, 40)]
    head = set(trimmed._head._ids) if trimmed._head else set()
    for model in models:
        model.align_rows(find_alignment(model))  # or a lone row would be rounded otherwise than one of many
        told = np.concatenate([model.score(tokens[:25], tokens[1:26]), model.score(tokens[25:39], tokens[26:])])
        assert model.length == 39
        model.rollback(0)
        for i, following in enumerate(tokens[1:]):
            logits = model.decode(tokens[i : i + 1]).logits[0].astype(np.float64)
            if model is trimmed and following not in head:
                continue
            expected = logits[following] - np.log(np.exp(logits).sum())
            assert told[i] == pytest.approx(expected, abs=2e-2)


def test_a_token_beyond_the_head_is_scored_by_the_sources_row(models: tuple[Model, Model]) -> None:
    _, trimmed = models
    assert trimmed._head is not None
    beyond = next(token for token in range(N_VOCAB) if token not in set(trimmed._head._ids))
    (told,) = trimmed.score([5], [beyond])
    trimmed.rollback(0)
    trimmed.reach([beyond])
    logits = trimmed.decode([5]).logits[0].astype(np.float64)
    kept = logits[np.isfinite(logits)]
    assert told == pytest.approx(logits[beyond] - np.log(np.exp(kept).sum()), abs=1e-3)


def test_logits_that_are_not_numbers_are_an_error(
    open_model: Open, exports: tuple[Export, Export], tmp_path: Path
) -> None:
    damaged = shutil.copytree(exports[1].path, tmp_path / "damaged")
    weights = np.fromfile(damaged / "weights.bin", np.float32)
    weights[-8:] = np.nan  # the last scales of the head
    weights.tofile(damaged / "weights.bin")
    model = open_model(open_export(damaged))
    with pytest.raises(BackendError, match="not numbers"):
        model.decode(TOKENS, want=Output.TOP_K)
    model.close()
