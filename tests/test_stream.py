"""Laws of one streamed answer; a token is a byte."""

from __future__ import annotations

import pytest

from edge_spec.decoding import Drafter, NoDrafter, Session, SpeculativeDecoder
from edge_spec.errors import UsageError
from edge_spec.generation import EngineInfo, Stream, make_result
from edge_spec.tokenizer import Detokenizer
from edge_spec.types import Context, Draft, FinishReason, Prompt, SamplingParams
from tests.fakes import ScriptedLM

PROMPT, STOP = [257], 256
INFO = EngineInfo("t", None, "fake", "none", 1, 256, 0.0, [], SamplingParams(), None)


class Oracle(Drafter):
    """Drafts what the scripted model will write."""

    name = "oracle"

    def __init__(self, script: bytes) -> None:
        self.script = list(script)

    def propose(self, context: Context, max_tokens: int) -> Draft:
        written = len(context) - len(PROMPT)
        return Draft(self.script[written : written + max_tokens], source=self.name)


def stream_of(text: str | bytes, *, drafted: bool, stop: tuple[str, ...] = (), max_tokens: int | None = None) -> Stream:
    script = text.encode() if isinstance(text, str) else text
    decoder = SpeculativeDecoder(Session(ScriptedLM(script, STOP)), Oracle(script) if drafted else NoDrafter())
    return Stream(
        lambda cancelled: decoder.generate(PROMPT, stop_ids=[STOP], max_tokens=max_tokens, cancelled=cancelled),
        decoder,
        Detokenizer(lambda token: bytes([token]) if token < STOP else b""),
        stop,
        lambda stream: make_result(stream, prompt=Prompt(PROMPT), info=INFO),
    )


@pytest.mark.parametrize("drafted", [False, True])
@pytest.mark.parametrize("stop", ["cd", "abcdef", "f", "é"])
def test_a_stop_string_ends_text_and_ids_at_the_same_token_whatever_drafts(stop: str, drafted: bool) -> None:
    stream = stream_of("abcdefé and more of it", drafted=drafted, stop=(stop,))
    pieces = list(stream)
    end = "abcdefé".index(stop)
    assert stream.result.text == "".join(piece.text for piece in pieces) == "abcdefé"[:end]
    assert bytes(stream.result.token_ids) == "abcdefé"[: end + len(stop)].encode()
    assert stream.result.generated_tokens == sum(len(piece.token_ids) for piece in pieces)
    assert stream.result.finish_reason is FinishReason.STOP_STRING


def test_what_was_held_back_comes_at_the_end() -> None:
    stream = stream_of("abc", drafted=True, stop=("bcd",))
    assert "".join(piece.text for piece in stream) == stream.result.text == "abc"
    assert stream.result.finish_reason is FinishReason.STOP


def test_a_character_that_was_cut_is_shown_as_such() -> None:
    stream = stream_of("aé", drafted=False, max_tokens=2)
    assert "".join(piece.text for piece in stream) == "a\ufffd"


def test_a_stop_string_in_the_last_flush_keeps_the_text_before_it() -> None:
    stream = stream_of("aé", drafted=False, max_tokens=2, stop=("a\ufffdx", "\ufffd"))
    assert "".join(piece.text for piece in stream) == stream.result.text == "a"


def test_a_stream_can_be_left_and_gone_on_with() -> None:
    stream = stream_of("abcdef", drafted=False)
    first = next(iter(stream))
    with pytest.raises(UsageError, match="not ended"):
        _ = stream.result
    assert first.text + "".join(piece.text for piece in stream) == stream.result.text == "abcdef"


@pytest.mark.parametrize("pieces", [0, 2])
def test_closing_ends_a_stream_where_it_is(pieces: int) -> None:
    stream = stream_of("abcdef", drafted=False)
    for _ in range(pieces):
        next(iter(stream))
    stream.close()
    stream.close()
    assert list(stream) == []
    assert stream.result.text == "abcdef"[:pieces]
    assert stream.result.finish_reason is FinishReason.CANCELLED
    assert 0 <= stream.result.total_s < 10


def test_closing_a_stream_that_has_ended_changes_nothing() -> None:
    stream = stream_of("abc", drafted=False)
    list(stream)
    before = stream.result
    stream.close()
    assert stream.result is before
