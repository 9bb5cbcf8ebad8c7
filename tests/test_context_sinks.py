"""Sinks on tiny models: conversations and texts that go on past the window by eviction."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest

from edge_spec import Engine, FinishReason
from edge_spec.errors import UsageError
from tests.tiny_models import write_tiny_gguf

QUESTIONS = [f"the list {i} is sorted in order of {i * 7}, is it?" for i in range(7)]


@pytest.fixture(scope="module", params=["onnx", "llama"])
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    if request.param == "llama":
        pytest.importorskip("llama_cpp")
    folder = tmp_path_factory.mktemp("models")
    write_tiny_gguf(folder / "target.gguf", n_vocab=512)
    shutil.copy(folder / "target.gguf", folder / "draft.gguf")
    recipe = "int8" if request.param == "onnx" else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGE_SPEC_HOME", str(folder / "home"))
        with Engine.load(
            target=folder / "target.gguf",
            draft=folder / "draft.gguf",
            backend=request.param,
            recipe=recipe,
            threads=1,
            n_ctx=256,
        ) as loaded:
            yield loaded


@pytest.mark.parametrize("drafter", ["lookup", "model", "auto"])
def test_a_conversation_that_loses_its_middle_is_the_same_for_every_drafter(engine: Engine, drafter: str) -> None:
    plain, drafted = engine.chat(on_full="sinks"), engine.chat(on_full="sinks")
    for question in QUESTIONS:
        expected = plain.send(question, max_tokens=40, drafter="none")
        result = drafted.send(question, max_tokens=40, drafter=drafter)
        assert result.token_ids == expected.token_ids
        assert result.dropped == expected.dropped
    assert expected.dropped[0].policy == "sinks"
    assert expected.dropped[0].tokens > 100
    assert any("no longer in the context" in note for note in result.notes)
    assert [m["content"] for m in plain.messages if m["role"] == "user"] == QUESTIONS


def test_a_turn_behind_an_eviction_reads_only_what_is_new(engine: Engine) -> None:
    if not engine._target.spec.can_evict:
        pytest.skip("this backend reads again")
    engine.reset()
    chat, known = engine.chat(on_full="sinks"), 0
    for question in QUESTIONS:
        asking = chat._keeper.ask(question, n_ctx=256, max_tokens=20)
        unread = engine._target.count_unread(asking.prompt.ids, asking.prompt.holes)
        result = chat.send(question, max_tokens=20, drafter="none")
        assert unread <= result.prompt_tokens - known + sum(part.tokens for part in result.dropped) + 2
        known = result.prompt_tokens + result.generated_tokens + sum(part.tokens for part in result.dropped)
        assert unread < 80
    assert result.dropped


def test_a_text_goes_on_when_the_window_is_full(engine: Engine) -> None:
    plain = engine.generate("def merge", raw=True, max_tokens=400, on_full="sinks", drafter="none")
    if plain.finish_reason is FinishReason.LENGTH:
        assert plain.generated_tokens == 400
        assert plain.dropped[0].tokens >= 400 - 256
    for drafter in ("lookup", "auto"):
        other = engine.generate("def merge", raw=True, max_tokens=400, on_full="sinks", drafter=drafter)
        assert other.token_ids == plain.token_ids
        assert other.dropped == plain.dropped


def test_a_prompt_longer_than_the_window_streams_through_it(engine: Engine) -> None:
    prompt = " ".join(QUESTIONS * 3)
    assert engine.count(prompt) > 400
    plain = engine.generate(prompt, max_tokens=10, on_full="sinks", drafter="none")
    assert plain.prompt_tokens < 256
    assert plain.dropped[0].tokens + plain.prompt_tokens > engine.count(prompt)
    engine.reset()
    assert engine.generate(prompt, max_tokens=10, on_full="sinks", drafter="auto").token_ids == plain.token_ids


def test_pruning_on_demand_in_the_middle_of_an_answer_and_between_two(engine: Engine) -> None:
    chat = engine.chat(on_full="sinks")
    stream = chat.stream(QUESTIONS[0], max_tokens=30, drafter="none")
    pieces = iter(stream)
    for _ in range(3):
        next(pieces)
    assert stream.prune(30)
    assert sum(len(piece.token_ids) for piece in pieces)
    assert stream.result.dropped[0].tokens > 0
    assert chat.prune(24) > 0
    assert chat.send("and?", max_tokens=4).prompt_tokens < 60
    assert not engine.stream("x", max_tokens=5).prune(2), "the policy is to refuse"


def test_a_single_prompt_has_no_turns(engine: Engine) -> None:
    with pytest.raises(UsageError, match="sinks, error"):
        engine.stream("x", on_full="turns")
