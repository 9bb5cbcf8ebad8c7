"""Session: the cache always agrees with the sequence that was named, and no more is read than has to be."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edge_spec.decoding.prefix import common_prefix
from edge_spec.decoding.session import Session
from edge_spec.errors import BackendError, ContextLengthError, GenerationCancelled
from tests.fakes import FakeLM


def expected_rows(model: FakeLM, context: list[int], rows: int) -> np.ndarray:
    return np.stack([model.logits_after(context[: len(context) - rows + i + 1]) for i in range(rows)])


def check(session: Session, model: FakeLM, context: list[int], rows: int = 1, **options: object) -> None:
    decoded = session.decode(context, rows=rows, **options)  # type: ignore[arg-type]
    np.testing.assert_array_equal(decoded.logits, expected_rows(model, context, rows))
    assert model.tokens == context


@pytest.mark.parametrize("max_rollback", [None, 0, 3])
@pytest.mark.parametrize("seed", range(5))
def test_logits_are_those_of_the_named_sequence_whatever_came_before(seed: int, max_rollback: int | None) -> None:
    rng = np.random.default_rng(seed)
    model = FakeLM(n_vocab=3, order=None, seed=seed, max_rollback=max_rollback)
    session = Session(model)
    context = [0]
    for _ in range(120):
        kept = context[: rng.integers(0, len(context) + 1)] if rng.random() < 0.7 else context
        context = (kept + rng.integers(0, 3, rng.integers(1, 9)).tolist())[:64]
        rows = int(rng.integers(1, min(8, len(context)) + 1))
        check(session, model, context, rows, chunk=int(rng.integers(1, 12)))


def test_only_what_is_new_is_read() -> None:
    model = FakeLM()
    session = Session(model)
    session.decode([1, 2, 3])
    session.decode([1, 2, 3, 4, 5])
    assert [call.tokens for call in model.calls] == [(1, 2, 3), (4, 5)]
    assert session.num_read == 5
    assert model.rollbacks == [0]  # the first use makes sure of an empty cache


def test_the_last_rows_are_always_read_again() -> None:
    model = FakeLM()
    session = Session(model)
    session.decode([1, 2, 3, 4])
    session.decode([1, 2, 3, 4], rows=1)
    session.decode([1, 2, 3, 4], rows=3)
    assert [(call.start, call.tokens) for call in model.calls[1:]] == [(3, (4,)), (1, (2, 3, 4))]
    assert session.num_read == 4 + 1 + 3


def test_logits_are_asked_for_in_the_last_chunk_only() -> None:
    model = FakeLM()
    Session(model).decode(list(range(11)), rows=3, chunk=4)
    assert [(len(call.tokens), call.rows) for call in model.calls] == [(4, 0), (4, 0), (3, 3)]


@pytest.mark.parametrize("length", range(1, 20))
def test_the_last_chunk_holds_all_rows(length: int) -> None:
    model = FakeLM(order=None)
    check(Session(model), model, [i % 16 for i in range(length)], min(length, 4), chunk=4)
    assert all(len(call.tokens) <= 4 for call in model.calls)


def test_progress_counts_what_is_read_now() -> None:
    session = Session(FakeLM())
    seen: list[tuple[int, int]] = []
    session.decode([1, 2], on_progress=lambda done, total: seen.append((done, total)))
    session.decode([1, 2, 3, 4, 5, 6, 7], chunk=2, on_progress=lambda done, total: seen.append((done, total)))
    assert seen == [(2, 2), (2, 5), (4, 5), (5, 5)]


def test_cancelling_between_chunks_keeps_what_was_read() -> None:
    model = FakeLM()
    session = Session(model)
    context = list(range(10))
    with pytest.raises(GenerationCancelled):
        session.decode(context, chunk=2, on_progress=lambda done, _total: done < 4)
    assert model.num_decoded == 4
    check(session, model, context)
    assert model.num_decoded == 10


def test_a_failed_decode_is_forgotten() -> None:
    model = FakeLM(order=None, fail_at=2)
    session = Session(model)
    context = list(range(8))
    with pytest.raises(BackendError):
        session.decode(context, chunk=2)
    check(session, model, context)
    assert model.rollbacks == [0, 0]


def test_an_interrupt_inside_the_backend_is_a_failed_decode(monkeypatch: pytest.MonkeyPatch) -> None:
    model = FakeLM(order=None)
    session = Session(model)
    session.decode([1, 2, 3])
    decode = model.decode

    def interrupted(tokens: list[int], **options: Any) -> None:
        decode(tokens, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(model, "decode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        session.decode([1, 2, 3, 4])
    monkeypatch.undo()
    check(session, model, [1, 2, 3, 5])


def test_a_progress_callback_that_raises_costs_nothing() -> None:
    model = FakeLM()
    session = Session(model)

    def fail(_done: int, _total: int) -> None:
        raise RuntimeError("the display broke")

    with pytest.raises(RuntimeError):
        session.decode([1, 2, 3, 4], chunk=2, on_progress=fail)
    check(session, model, [1, 2, 3, 4])
    assert model.num_decoded == 4


def test_a_refused_rollback_reads_everything_again_and_is_counted() -> None:
    model = FakeLM(max_rollback=1)
    session = Session(model)
    session.decode([1, 2, 3, 4])
    check(session, model, [1, 2, 3, 5])
    assert session.num_refused_rollbacks == 0
    check(session, model, [1, 6, 7])
    assert session.num_refused_rollbacks == 1
    assert model.calls[-1].tokens == (1, 6, 7)


def test_too_long_a_context_is_refused_before_anything_is_read() -> None:
    model = FakeLM(n_ctx=4)
    session = Session(model)
    check(session, model, [1, 2, 3, 4])
    with pytest.raises(ContextLengthError) as caught:
        session.decode([1, 2, 3, 4, 5])
    assert (caught.value.needed, caught.value.n_ctx) == (5, 4)
    assert len(model.calls) == 1


def test_a_view_dies_with_the_next_decode() -> None:
    session = Session(FakeLM())
    first = session.decode([1, 2], rows=2)
    session.decode([1, 2, 3])
    assert np.isnan(first.logits[1]).all()


def test_any_sequence_of_ids_will_do() -> None:
    model = FakeLM()
    Session(model).decode((1, 2, 3))
    assert model.tokens == [1, 2, 3]


@pytest.mark.parametrize("length", [0, 1, 5, 1023, 1024, 1025, 3000])
def test_common_prefix_finds_every_first_difference(length: int) -> None:
    rng = np.random.default_rng(length)
    left = rng.integers(0, 100_000, length).tolist()
    assert common_prefix(left, [*left, 7]) == length
    for at in {0, length // 2, length - 1} - {-1, length}:
        right = [*left[:at], -1, *left[at + 1 :]]
        assert common_prefix(left, right) == at


class ScoringLM(FakeLM):
    """Scores long passes, as the onnx backend does."""

    scored_rows = 64

    def score(self, tokens: list[int], following: list[int]) -> NDArray[np.float32]:
        told = []
        for token, after in zip(tokens, following, strict=True):
            logits = super().decode([token]).logits[0].astype(np.float64)
            told.append(logits[after] - np.log(np.exp(logits).sum()))
        return np.array(told, np.float32)


@pytest.mark.parametrize("length", [0, 1, 2, 64, 65, 66, 150])
def test_a_score_is_the_same_whether_or_not_the_model_scores_long_passes(length: int) -> None:
    ids = [number * 7 % 16 for number in range(length)]
    few, long = (Session(model) for model in (FakeLM(n_ctx=256), ScoringLM(n_ctx=256)))
    for session in (few, long):
        session.decode([1, 2, 3])
        session.decode([1, 2, 3, 4, 5])
    assert long.score(ids) == pytest.approx(few.score(ids), abs=1e-4)
    assert long.count_unread([*ids, 3]) <= 2, "what was scored was read"
