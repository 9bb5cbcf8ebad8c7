"""Down the ladder in the middle of an answer: what goes, in which order, and what is left of the conversation."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import pytest

from edge_spec import Engine, FinishReason
from edge_spec.context import Sinks, WholeTurns
from edge_spec.decoding import SpeculativeDecoder
from edge_spec.decoding.session import Session
from edge_spec.drafting import ModelDrafter
from edge_spec.ladder import Ladder
from edge_spec.memory.pressure import Level, Reading
from edge_spec.memory.process import Usage
from tests.fakes import FakeLM
from tests.tiny_models import write_tiny_gguf

WORDS = "the list is sorted in order and the window is long "
LONG = WORDS * 4


class Held:
    """A process whose memory does not change."""

    def read(self) -> Usage:
        return Usage(0, 0)


class Squeeze:
    """Memory is short for so many readings, after so many calm ones."""

    def __init__(self, calm: int, short: int, n_ctx: int = 2048) -> None:
        self._calm, self._short = calm, short

    def read(self) -> Reading:
        if self._calm:
            self._calm -= 1
            return Reading(Level.CALM)
        if self._short:
            self._short -= 1
            return Reading(Level.HIGH, "the test says so")
        return Reading(Level.CALM)


# On fakes


def test_the_first_rung_is_what_is_parked_then_the_draft_then_the_context_then_the_window() -> None:
    ladder = Ladder(Session(FakeLM()), None, Held())
    assert ladder.rungs == [ladder.give_up_parked, ladder.unload_draft, ladder.prune_context, ladder.fit_window]


def test_what_is_parked_goes_for_good_the_drafts_too() -> None:
    sessions = [Session(FakeLM(n_ctx=512), parked_bytes=10**6) for _ in range(2)]
    ladder = Ladder(sessions[0], ModelDrafter(sessions[1]), Held())
    for session in sessions:
        session.decode([1] * 200)
        session.decode([2] * 200)
    assert ladder.give_up_parked() == "parked chats were given up (0B given back)"
    assert [session.parked_bytes for session in sessions] == [0, 0]
    assert ladder.give_up_parked() is None
    sessions[0].decode([1] * 200)
    assert sessions[0].num_parked == 0
    assert sessions[0].count_unread([2] * 200) == 200


def test_where_nothing_is_parked_yet_nothing_is_told_and_none_is_parked_from_then_on() -> None:
    session = Session(FakeLM(n_ctx=512), parked_bytes=10**6)
    session.decode([1] * 200)
    assert Ladder(session, None, Held()).give_up_parked() is None
    session.decode([2] * 200)
    assert session.num_parked == 0


def read_session(n_ctx: int, length: int) -> Session:
    session = Session(FakeLM(n_ctx=n_ctx))
    session.decode([number % 16 for number in range(length)])
    return session


def test_a_window_that_is_more_than_half_empty_is_cut_before_text_goes() -> None:
    pruned: list[int] = []
    session = read_session(4096, 1000)
    ladder = Ladder(session, None, Held())
    ladder.attend(lambda most: pruned.append(most) or 500)  # type: ignore[func-returns-value]
    assert ladder.prune_context() is None
    assert ladder.fit_window() is not None
    assert ladder.prune_context() == "500 tokens were dropped from the context of 1000"
    assert pruned == [500]


@pytest.mark.parametrize("prune", [None, lambda _most: 0])
def test_what_cannot_be_pruned_is_no_measure(prune: Callable[[int], int] | None) -> None:
    ladder = Ladder(read_session(1024, 900), None, Held())
    ladder.attend(prune)
    assert ladder.prune_context() is None


def test_a_short_context_stays_whole() -> None:
    ladder = Ladder(read_session(512, 500), None, Held())
    ladder.attend(lambda _most: 1)
    assert ladder.prune_context() is None


@pytest.mark.parametrize("eviction", [Sinks(), WholeTurns(2, (5, 9, 12))])
def test_pruning_between_two_steps_shortens_the_cache_at_once_and_reads_nothing(eviction: Sinks | WholeTurns) -> None:
    model = FakeLM(n_ctx=64)
    decoder = SpeculativeDecoder(Session(model))
    steps = decoder.generate(list(range(15)), max_tokens=30, eviction=eviction)
    for _ in range(4):
        next(steps)
    read, length = model.num_decoded, len(model.tokens)
    gone = decoder.prune_now(10)
    assert gone > 0
    assert len(model.tokens) == length - gone
    assert model.num_decoded == read
    next(steps)
    assert model.num_decoded == read + 1
    assert sum(len(step.tokens) for step in steps) == 30 - 5


def test_a_prompt_that_was_not_read_yet_is_not_pruned() -> None:
    decoder = SpeculativeDecoder(Session(FakeLM(n_ctx=64)))
    steps = decoder.generate(list(range(15)), max_tokens=3, eviction=Sinks())
    assert decoder.prune_now(8) == 0
    assert sum(len(step.tokens) for step in steps) == 3
    assert not decoder.stats.holes


def test_whole_turns_go_oldest_first_and_none_twice() -> None:
    turns = WholeTurns(10, (20, 30, 45))
    assert turns.span(100, 100) is None, "a full window is no reason"
    assert turns.span_down_to(100, 95) == (10, 20)
    assert turns.span_down_to(100, 85) == (10, 30)
    assert turns.span_down_to(100, 1) == (10, 45), "as few as may be"
    left = turns.after(10, 20)
    assert left == WholeTurns(10, (20, 35))
    assert left.after(10, 35).span_down_to(50, 1) is None
    assert [turns.count(tokens) for tokens in (0, 10, 20, 35)] == [0, 1, 2, 3]


# On tiny models


@pytest.fixture(scope="module", params=["onnx", "llama"])
def backend(request: pytest.FixtureRequest) -> str:
    if request.param == "llama":
        pytest.importorskip("llama_cpp")
    return str(request.param)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("models")
    write_tiny_gguf(folder / "target.gguf", n_vocab=512, n_ctx=2048)
    shutil.copy(folder / "target.gguf", folder / "draft.gguf")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGE_SPEC_HOME", str(folder / "home"))
        yield folder


@contextmanager
def squeezed(
    models: Path, backend: str, *, calm: int, short: int, n_ctx: int = 2048, parked: str | int = 0
) -> Iterator[Engine]:
    """An engine whose governor looks at every step, and finds memory short a while."""
    with Engine.load(
        target=models / "target.gguf",
        draft=models / "draft.gguf",
        backend=backend,
        recipe="int8" if backend == "onnx" else None,
        threads=1,
        n_ctx=n_ctx,
        parked=parked,
    ) as engine:
        ticks = count()
        governor = engine._governor
        governor._machine, governor._clock = [], lambda: float(next(ticks))
        governor.watch(Squeeze(calm, short))
        yield engine


def test_an_answer_goes_down_the_ladder_and_ends_with_its_partial_text(models: Path, backend: str) -> None:
    with squeezed(models, backend, calm=60, short=10**6, n_ctx=1024) as engine:
        result = engine.generate(LONG * 8, raw=True, max_tokens=200, on_full="sinks", drafter="model")
    assert result.finish_reason is FinishReason.MEMORY
    assert 0 < result.generated_tokens < 200
    assert result.measures[0].startswith("the draft model was unloaded"), result.measures
    assert "dropped from the context" in result.measures[1], result.measures
    assert result.measures[2].startswith("the window was cut from 1024"), result.measures
    assert result.dropped[0].policy == "sinks"
    assert result.n_ctx < 1024
    for measure in result.measures:
        assert any(measure in note and "memory" in note for note in result.notes)
    assert any("stopped" in note for note in result.notes)


def test_a_conversation_loses_whole_turns_in_the_middle_of_an_answer_and_goes_on_without_them(
    models: Path, backend: str
) -> None:
    with squeezed(models, backend, calm=10**6, short=0, n_ctx=1280) as engine:
        chat = engine.chat()
        for number in range(6):
            chat.send(f"{number} {LONG}", max_tokens=8)
        before = len(chat.prompt("and?", max_tokens=8).ids)
        engine._governor.watch(Squeeze(20, 2))  # the draft, and the context
        result = chat.send(f"6 {LONG}", max_tokens=40, drafter="model")
        assert "dropped from the context" in result.measures[1], result.measures
        (dropped,) = result.dropped
        assert dropped.policy == "turns"
        assert f"1 {LONG}".strip() in dropped.text
        assert f"0 {LONG}".strip() not in dropped.text, "the first turn stays"
        assert dropped.tokens > before // 3
        following = chat.prompt("and?", max_tokens=8)
        assert len(following.ids) < before
        assert sum(part.tokens for part in following.dropped) == dropped.tokens
        text = engine.tokenizer.decode(following.ids)
        assert f"0 {LONG}".strip() in text
        assert f"6 {LONG}".strip() in text
        assert f"1 {LONG}".strip() not in text
        assert chat.send("and?", max_tokens=8).token_ids == fresh(engine, following.ids, 8)


def fresh(engine: Engine, ids: list[int], count: int) -> list[int]:
    """What is written behind these ids from an empty cache."""
    from edge_spec.types import Prompt

    engine.reset()
    stream = engine.stream_prompt(Prompt(ids), max_tokens=count, drafter="none")
    list(stream)
    return stream.result.token_ids


def test_parked_chats_are_given_up_before_anything_else(models: Path, backend: str) -> None:
    with squeezed(models, backend, calm=10**6, short=0, parked="64MiB") as engine:
        one, two = engine.chat(), engine.chat()
        for turn, chat in enumerate((one, two, one)):
            chat.send(f"{turn} {LONG}", max_tokens=4)
        assert engine._target.num_parked == 1
        engine._governor.watch(Squeeze(2, 1))
        result = one.send("and?", max_tokens=20, drafter="none")
        assert [measure.split(" (")[0] for measure in result.measures] == ["parked chats were given up"]
        assert engine._target.num_parked == 0
        assert not engine._drafters["model"].is_unloaded  # type: ignore[attr-defined]
        before = two.prompt("and?")
        alone = two.send("and?", max_tokens=8).token_ids
        assert alone == fresh(engine, before.ids, 8)


def test_a_generation_that_may_lose_nothing_loses_nothing(models: Path, backend: str) -> None:
    with squeezed(models, backend, calm=60, short=10**6) as engine:
        result = engine.generate(LONG * 8, raw=True, max_tokens=200, drafter="none")
    assert result.finish_reason is FinishReason.MEMORY
    assert result.dropped == ()
    assert not any("dropped" in measure for measure in result.measures)


def test_a_smaller_budget_is_kept_from_then_on(models: Path) -> None:
    with squeezed(models, "onnx", calm=10**6, short=0) as engine:
        engine.limit_memory("16MiB")  # less than Python takes
        assert engine.info.budget_bytes == 16 << 20
        result = engine.generate(WORDS, raw=True, max_tokens=50)
        assert result.finish_reason is FinishReason.MEMORY
        engine.limit_memory("64GiB")
        assert engine.generate(WORDS, raw=True, max_tokens=5).generated_tokens == 5
