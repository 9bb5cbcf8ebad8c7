"""Condensed prompts: what says what to do stays, the rest goes by what it tells, and what went is reported."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from typing import cast

import numpy as np
import pytest
from numpy.typing import NDArray

from edge_spec import Engine
from edge_spec.context import Surprisal, draft_score
from edge_spec.context.units import phrases, sentences
from edge_spec.decoding import Session
from edge_spec.errors import UsageError
from edge_spec.tokenizer import Tokenizer
from tests.fakes import FakeLM
from tests.tiny_models import write_tiny_gguf

TEXT = """Summarize: The harbour was quiet in the morning, and nothing moved on the water. Gulls sat on the rail.
A red boat called Ostara came in at noon, with nine crates of lemons (from Crete). The harbour was quiet again.
def total(prices):
    return sum(prices)

How many crates did the Ostara bring?"""


class Characters:
    """A token is a character."""

    def encode(self, text: str) -> list[int]:
        return [ord(char) for char in text]

    def token_bytes(self, token: int) -> bytes:
        return chr(token).encode()


CHARACTERS = cast("Tokenizer", Characters())


def flat(ids: Sequence[int]) -> NDArray[np.float64]:
    return np.ones(len(ids))


@pytest.mark.parametrize("text", [TEXT, "", " ", "one", "a\n\n\nb", "Ende. Über 3 Häuser? Ja! 你好。再见。", "x" * 500])
def test_units_leave_nothing_out(text: str) -> None:
    units = sentences(text)
    assert "".join(text[unit.start : unit.end] for unit in units) == text
    pieces = [piece for unit in units for piece in phrases(text, unit)]
    assert "".join(text[piece.start : piece.end] for piece in pieces) == text


def test_instructions_questions_and_the_last_line_are_kept() -> None:
    kept = [TEXT[unit.start : unit.end].strip() for unit in sentences(TEXT) if unit.is_kept]
    assert kept == ["Summarize:", "How many crates did the Ostara bring?"]


def test_lines_of_code_are_units() -> None:
    lines = [TEXT[unit.start : unit.end] for unit in sentences(TEXT)]
    assert "def total(prices):\n" in lines


@pytest.mark.parametrize("keep", [0.25, 0.5, 0.75])
@pytest.mark.parametrize("text", [TEXT, TEXT.replace("harbour", "häfen 港")])
def test_the_share_is_held_and_what_went_is_told(text: str, keep: float) -> None:
    condensed = Surprisal(keep).condense(text, CHARACTERS, flat)
    assert len(condensed.text) <= max(keep, 0.2) * len(text) + 3
    assert condensed.text.startswith("Summarize: ")
    assert condensed.text.endswith("How many crates did the Ostara bring?")
    assert condensed.tokens >= len(text) * (1 - keep) - 3
    assert all(part in text for part in condensed.left_out)
    rest = text
    for part in condensed.left_out:
        assert part in rest
        rest = rest.split(part, 1)[1]


def test_what_the_question_names_is_kept_and_what_could_be_guessed_goes() -> None:
    condensed = Surprisal(0.5).condense(TEXT, CHARACTERS, flat)
    assert "Ostara" in condensed.text.removesuffix("How many crates did the Ostara bring?")
    assert "nine crates" in condensed.text

    def lemons_are_news(ids: Sequence[int]) -> NDArray[np.float64]:
        text = "".join(map(chr, ids))
        start = text.find("lemons")
        return np.array([5.0 if start >= 0 and start - 10 <= i < start + 6 else 1.0 for i in range(len(ids))])

    assert "lemons" in Surprisal(0.5).condense(TEXT, CHARACTERS, lemons_are_news).text


def test_the_draft_reads_hardly_more_than_what_is_kept() -> None:
    seen: list[int] = []

    def count(ids: Sequence[int]) -> NDArray[np.float64]:
        seen.append(len(ids))
        return flat(ids)

    Surprisal(0.5).condense(TEXT * 3, CHARACTERS, count)
    assert sum(seen) <= 0.6 * len(TEXT * 3)


def test_the_draft_reads_no_sentence_that_stays_anyway() -> None:
    seen: list[str] = []

    def note(ids: Sequence[int]) -> NDArray[np.float64]:
        seen.append("".join(map(chr, ids)))
        return flat(ids)

    condensed = Surprisal(0.5).condense(TEXT * 3, CHARACTERS, note)
    (read,) = seen
    assert not read.endswith("How many crates did the Ostara bring?")
    assert len(read) <= 0.45 * len(TEXT * 3)
    assert len(condensed.text) > 0.4 * len(TEXT * 3)
    whole = Surprisal(0.5, sure=0.0).condense(TEXT * 3, CHARACTERS, note)
    assert len(seen[-1]) > len(read)
    assert len(whole.text) <= 0.5 * len(TEXT * 3) + 3


@pytest.mark.parametrize("length", [1, 2, 8, 9, 30, 70])
def test_surprisal_is_minus_the_log_of_the_drafts_probability(length: int) -> None:
    model = FakeLM(n_vocab=16, n_ctx=32, order=2)
    ids = [int(token) for token in np.random.default_rng(0).integers(0, 16, length)]
    surprise = draft_score(Session(model), room=31)(ids)
    assert len(surprise) == length
    for i in range(1, length):
        if i % 31 == 0:
            assert surprise[i] == 0, "nothing stands before the first token of a part"
            continue
        logits = model.logits_after(ids[i - i % 31 : i])
        assert surprise[i] == pytest.approx(np.log(np.exp(logits).sum()) - logits[ids[i]], abs=1e-4)


# The engine


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    folder = tmp_path_factory.mktemp("models")
    write_tiny_gguf(folder / "target.gguf", n_vocab=512)
    shutil.copy(folder / "target.gguf", folder / "draft.gguf")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGE_SPEC_HOME", str(folder / "home"))
        files = {"target": folder / "target.gguf", "draft": folder / "draft.gguf"}
        with Engine.load(**files, recipe="int8", threads=1, n_ctx=512) as loaded:  # type: ignore[arg-type]
            yield loaded


def test_greedy_text_behind_a_condensed_prompt_is_the_same_for_every_drafter(engine: Engine) -> None:
    plain = engine.generate(TEXT, keep=0.5, max_tokens=20, drafter="none")
    assert plain.prompt_tokens < engine.generate(TEXT, max_tokens=1).prompt_tokens * 0.7
    (dropped,) = plain.dropped
    assert dropped.policy == "surprisal"
    assert dropped.tokens >= engine.count(TEXT) // 2 - 1
    assert dropped.text
    assert any("were not read" in note for note in plain.notes)
    for drafter in ("lookup", "model", "auto"):
        other = engine.generate(TEXT, keep=0.5, max_tokens=20, drafter=drafter)
        assert other.token_ids == plain.token_ids
        assert other.dropped == plain.dropped


def test_what_was_not_read_can_still_be_copied_from(engine: Engine) -> None:
    engine.generate(TEXT, keep=0.4, max_tokens=2, drafter="lookup")
    archive = engine._drafters["lookup"]._archive  # type: ignore[attr-defined]
    assert engine._source.tokenizer.decode(archive) == TEXT


def test_a_condensed_turn_stays_condensed_and_messages_hold_all_of_it(engine: Engine) -> None:
    chat = engine.chat()
    first = chat.send(TEXT, keep=0.5, max_tokens=4)
    second = chat.send("and?", max_tokens=4)
    assert chat.messages[-4]["content"] == TEXT
    assert second.prompt_tokens < first.prompt_tokens + 40
    assert not second.dropped


@pytest.mark.parametrize("keep", [0.0, 1.0, -1.0, 2.0])
def test_a_share_out_of_range_is_refused(engine: Engine, keep: float) -> None:
    with pytest.raises(UsageError, match="between 0 and 1"):
        engine.stream(TEXT, keep=keep)


def test_without_a_draft_there_is_nobody_to_ask(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(engine._drafters, "model")
    with pytest.raises(UsageError, match="needs a draft"):
        engine.stream(TEXT, keep=0.5)
