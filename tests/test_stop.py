"""Stop strings: what is shown does not depend on how the stream was divided."""

from __future__ import annotations

import random

import pytest

from edge_spec.decoding.stop import StopStrings
from edge_spec.errors import UsageError


def run(stops: list[str], pieces: list[str]) -> tuple[str, str | None]:
    stream = StopStrings(stops)
    shown = "".join([stream.push(piece) for piece in pieces])
    return shown + stream.flush(), stream.matched


@pytest.mark.parametrize(
    ("stops", "text", "shown", "matched"),
    [
        (["END"], "abcENDdef", "abc", "END"),
        (["END"], "abcEN", "abcEN", None),
        (["END"], "ENEND", "EN", "END"),
        (["aab"], "aaab", "a", "aab"),
        (["\n\n"], "a\nb\n\nc", "a\nb", "\n\n"),
        (["abcd", "c"], "abcd", "ab", "c"),  # the one that is complete first
        (["bc", "abc"], "xabcd", "x", "abc"),  # complete together: the longest
        ([], "abc", "abc", None),
        (["é"], "caféine", "caf", "é"),
    ],
)
def test_text_is_cut_at_the_first_stop_string(stops: list[str], text: str, shown: str, matched: str | None) -> None:
    assert run(stops, [text]) == (shown, matched)
    assert run(stops, list(text)) == (shown, matched)


def test_the_division_of_the_stream_never_matters() -> None:
    rng = random.Random(0)
    for _ in range(500):
        text = "".join(rng.choices("ab", k=rng.randrange(1, 12)))
        stops = ["".join(rng.choices("ab", k=rng.randrange(1, 5))) for _ in range(rng.randrange(1, 3))]
        cuts = sorted(rng.choices(range(len(text) + 1), k=3))
        pieces = [text[i:j] for i, j in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        assert run(stops, pieces) == run(stops, list(text))


def test_only_what_may_begin_a_stop_string_is_held_back() -> None:
    stream = StopStrings(["END"])
    assert [stream.push(piece) for piece in ["a", "E", "x", "EN", "E"]] == ["a", "", "Ex", "", "EN"]
    assert stream.flush() == "E"


def test_after_a_match_nothing_more_is_shown() -> None:
    stream = StopStrings(["."])
    assert stream.push("a.b") == "a"
    assert stream.push("c") == ""
    assert stream.flush() == ""


@pytest.mark.parametrize("stops", [[""], ["a", ""], "abc"])
def test_an_empty_stop_string_and_a_bare_string_are_refused(stops: list[str]) -> None:
    with pytest.raises(UsageError):
        StopStrings(stops)
