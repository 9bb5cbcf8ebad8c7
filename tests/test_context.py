"""What happens to a conversation that outgrows its window; tiny models."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from edge_spec import Engine, GenerationResult
from edge_spec.backends.onnx import OnnxModel
from edge_spec.context import ByTurns, TurnKeeper
from edge_spec.conversation import Chat
from edge_spec.errors import ContextLengthError, UsageError
from edge_spec.types import Decoded, Output
from tests.fake_engine import Answer, FakeEngine, run
from tests.tiny_models import write_tiny_gguf

WINDOW = 256
QUESTIONS = [f"the list {i} is sorted in order of {i * 7}, is it?" for i in range(12)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_tiny_gguf(folder / "target.gguf", n_vocab=512)
    shutil.copy(folder / "target.gguf", folder / "draft.gguf")
    return folder


@pytest.fixture(scope="module")
def engine(models: Path) -> Iterator[Engine]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGE_SPEC_HOME", str(models / "home"))
        files = {"target": models / "target.gguf", "draft": models / "draft.gguf"}
        with Engine.load(**files, recipe="int8", threads=1, n_ctx=WINDOW) as loaded:  # type: ignore[arg-type]
            yield loaded


def talk(chat: Chat, questions: Sequence[str] = QUESTIONS, *, drafter: str = "none") -> list[GenerationResult]:
    return [chat.send(question, max_tokens=12, drafter=drafter) for question in questions]


def keeper(chat: Chat) -> TurnKeeper:
    assert isinstance(chat._keeper, TurnKeeper)
    return chat._keeper


def ids_in_context(chat: Chat, question: str) -> list[int]:
    return keeper(chat)._transcript.ask(keeper(chat).turns, question).ids


# The policy


@pytest.mark.parametrize(
    ("turns", "question", "max_tokens", "expected"),
    [
        ([10, 10, 10], 10, 20, 0),  # all of it fits
        ([10, 30, 30, 10], 10, 20, 2),  # down to half the window, and not just so that it fits
        ([10, 10, 10, 60], 10, 10, 2),  # the latest turn stays where that leaves room for the answer
        ([10, 10, 10, 60], 10, 40, 3),
        ([10, 10, 10, 60], 10, None, 3),
        ([90, 10], 10, None, 1),  # what is left may be too much: then nothing fits
        ([120], 10, None, 0),
    ],
)
def test_the_oldest_turns_go_down_to_half_the_window(
    turns: list[int], question: int, max_tokens: int | None, expected: int
) -> None:
    def length(count: int) -> int:
        return turns[0] + sum(turns[1 + count :]) + question

    assert ByTurns().count(length, len(turns) - 1, 100, max_tokens) == expected


# Conversations


def test_a_conversation_goes_on_past_the_window(engine: Engine) -> None:
    chat = engine.chat(system="Be brief")
    results = talk(chat)
    assert sum(result.prompt_tokens + result.generated_tokens <= WINDOW for result in results) == len(QUESTIONS)
    assert [m["content"] for m in chat.messages if m["role"] == "user"] == QUESTIONS, "messages hold all of it"
    kept = [turn.question for turn in keeper(chat).turns]
    assert kept[0] == QUESTIONS[0]
    assert 1 < len(kept) < len(QUESTIONS)
    assert kept[1:] == QUESTIONS[-len(kept) + 1 :]


def test_what_was_dropped_is_reported_with_every_answer_that_lacks_it(engine: Engine) -> None:
    chat = engine.chat(system="Be brief")
    results, turns = [], []
    for question in QUESTIONS:
        results += talk(chat, [question])
        turns.append(keeper(chat).turns[-1])
    first = next(i for i, result in enumerate(results) if result.dropped)
    assert not any(result.notes != engine.info.notes for result in results[:first])
    for result in results[first:]:
        (dropped,) = result.dropped
        assert dropped.policy == "turns"
        assert dropped.text.startswith(f"user: {QUESTIONS[1]}\nassistant: ")
        assert any(f"({dropped.tokens} tokens)" in note for note in result.notes)
    everything = keeper(chat)._transcript.ask(turns, "and?").ids
    assert dropped.tokens == len(everything) - len(ids_in_context(chat, "and?"))
    chat.reset()
    assert not chat.send("hi", max_tokens=2).dropped


def test_what_is_left_is_what_the_template_makes_of_it(engine: Engine) -> None:
    chat = engine.chat(system="Be brief")
    talk(chat)
    messages = [*chat._system, *(m for turn in keeper(chat).turns for m in turn.messages)]
    messages.append({"role": "user", "content": "and?"})
    fresh = engine._source.template.render_ids(messages, engine._source.tokenizer)
    texts = (engine._source.tokenizer.decode(ids, skip_special=False) for ids in (ids_in_context(chat, "and?"), fresh))
    kept, anew = (text.replace("\ufffd", "") for text in texts)
    assert kept == anew


def test_a_turn_after_pruning_reads_at_most_what_moved_and_the_others_what_is_new(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    original = OnnxModel.decode

    def record(self: OnnxModel, tokens: Sequence[int], *, rows: int = 1, want: Output = Output.LOGITS) -> Decoded:
        read.append(len(tokens))
        return original(self, tokens, rows=rows, want=want)

    monkeypatch.setattr(OnnxModel, "decode", record)
    engine.reset()
    chat = engine.chat(system="Be brief")
    opening, known, dropped, prunings = 0, 0, 0, 0
    for question in QUESTIONS:
        read.clear()
        result = chat.send(question, max_tokens=12, drafter="none")
        prompt_read = sum(read) - (result.steps - 1)
        gone = sum(part.tokens for part in result.dropped)
        if gone > dropped:
            prunings += 1
            assert prompt_read <= result.prompt_tokens - opening + 2
        else:
            assert prompt_read <= result.prompt_tokens - known + 2
        opening = opening or result.prompt_tokens + result.generated_tokens
        known, dropped = result.prompt_tokens + result.generated_tokens, gone
    assert 2 <= prunings <= len(QUESTIONS) // 2, "the others read no more than a conversation that fits"


@pytest.mark.parametrize("drafter", ["lookup", "model", "auto"])
def test_greedy_text_of_a_pruned_conversation_is_the_same_for_every_drafter(engine: Engine, drafter: str) -> None:
    plain = talk(engine.chat(system="Be brief"))
    drafted = talk(engine.chat(system="Be brief"), drafter=drafter)
    assert [result.token_ids for result in drafted] == [result.token_ids for result in plain]
    assert plain[-1].dropped == drafted[-1].dropped != ()
    assert sum(result.accepted for result in drafted) > 0


def test_what_was_dropped_can_still_be_copied_from(engine: Engine) -> None:
    chat = engine.chat()
    talk(chat)
    lookup = engine._drafters["lookup"]
    chat.send("and?", max_tokens=2, drafter="lookup")
    archive = engine._source.tokenizer.decode(lookup._archive)  # type: ignore[attr-defined]
    assert QUESTIONS[1] in archive
    assert QUESTIONS[0] not in archive, "the first turn is in the context still"


def test_a_stop_string_does_not_undo_the_ids_of_other_turns(engine: Engine) -> None:
    chat = engine.chat()
    whole = engine.chat().send(QUESTIONS[0], max_tokens=30, drafter="none").text
    cut = chat.send(QUESTIONS[0], max_tokens=30, drafter="none", stop=[whole[8:11]])
    assert cut.text == whole[: whole.index(whole[8:11])]
    second = chat.send(QUESTIONS[1], max_tokens=5, drafter="none")
    chat.send(QUESTIONS[2], max_tokens=5, drafter="none")
    assert keeper(chat).turns[1].answered == second.token_ids


def test_the_first_turn_goes_before_a_question_is_refused(engine: Engine) -> None:
    chat = engine.chat()
    chat.send("qz" * 55, max_tokens=4, drafter="none")
    result = chat.send("qx" * 80, max_tokens=4, drafter="none")
    assert [turn.question for turn in keeper(chat).turns] == ["qx" * 80]
    assert result.dropped[0].text.startswith("user: qz")
    with pytest.raises(ContextLengthError):
        chat.send("qz" * 130, max_tokens=4)
    assert chat.send("hi", max_tokens=4).generated_tokens, "and the conversation is as it was"


def test_on_full_error_refuses_and_leaves_the_conversation_as_it_was(engine: Engine) -> None:
    chat = engine.chat(on_full="error")
    with pytest.raises(ContextLengthError):
        talk(chat)
    before = list(chat.messages)
    assert chat.prune(10) == 0
    with pytest.raises(ContextLengthError):
        chat.send("sorted " * 20)
    assert chat.messages == before
    assert len(keeper(chat).turns) == len(before) // 2


def test_an_unknown_policy_is_refused(engine: Engine) -> None:
    with pytest.raises(UsageError, match="turns, "):
        engine.chat(on_full="magic")


def test_pruning_on_demand_leaves_at_most_what_was_asked_for(engine: Engine) -> None:
    chat = engine.chat()
    talk(chat, QUESTIONS[:4])
    before = len(ids_in_context(chat, ""))
    gone = chat.prune(before // 2)
    assert 0 < gone == before - len(ids_in_context(chat, ""))
    assert before - gone <= before // 2
    assert chat.prune(before) == 0
    assert chat.send("and?", max_tokens=2).dropped[0].tokens == gone


# The command line


def test_the_policy_reaches_the_chat_and_what_was_dropped_the_status_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from edge_spec.types import Dropped

    dropped = (Dropped("turns", 812, "user: a"),)
    engine = FakeEngine(Answer(["x"], notes=("gone",), changes={"dropped": dropped}), "y").install(monkeypatch)
    transcript = run("chat", "--on-full", "error", stdin="a")
    assert engine.chat_options == [{"on_full": "error"}]
    assert "812 tokens dropped (turns)" in transcript.err
    assert "note: gone" in transcript.err
    run("chat", stdin="a")
    assert engine.chat_options[1] == {"on_full": "turns"}
