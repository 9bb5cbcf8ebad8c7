"""Sequences that take turns: what was displaced goes on where it was, within its bytes, and is never mistaken."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from edge_spec.backends.base import Parked
from edge_spec.context import Sinks, Stretch, read_on
from edge_spec.decoding.parking import LOOSE_END, WORTH_PARKING
from edge_spec.decoding.session import Session
from edge_spec.errors import BackendError, BackendMemoryError, GenerationCancelled
from edge_spec.types import Decoded, Hole, Output
from tests.fakes import FakeLM
from tests.test_holes import SeeingLM, fresh

LONG = 2 * WORTH_PARKING


def text(seed: int, length: int = LONG, *, prefix: Sequence[int] = ()) -> list[int]:
    more = np.random.default_rng(seed).integers(0, 16, length - len(prefix))
    return [*prefix, *map(int, more)]


def make(limit: int = 10**6, **options: Any) -> tuple[Session, FakeLM]:
    model = FakeLM(n_ctx=512, order=None, **options)
    return Session(model, parked_bytes=limit), model


def read(session: Session, model: FakeLM, context: list[int]) -> int:
    """Tokens that are read for `context`, whose logits are those of this very sequence."""
    before = model.num_decoded
    logits = session.decode(context).logits
    np.testing.assert_array_equal(logits[0], model.logits_after(context))
    assert model.tokens == context
    return model.num_decoded - before


def test_sequences_in_turn_read_only_what_is_new() -> None:
    session, model = make()
    chats = [text(seed) for seed in range(3)]
    assert [read(session, model, chat) for chat in chats] == [LONG] * 3
    for turn in range(4):
        for chat in chats:
            chat.extend(text(turn, 5))
            assert read(session, model, chat) == 5
    assert session.num_parked == 2


def test_without_room_for_it_nothing_is_parked() -> None:
    session, model = make(limit=0)
    one, two = text(0), text(1)
    assert [read(session, model, chat) for chat in (one, two, one, two)] == [LONG] * 4


def test_a_model_that_cannot_park_reads_again() -> None:
    session, model = make(can_park=False)
    assert [read(session, model, text(seed)) for seed in (0, 1, 0)] == [LONG] * 3


@pytest.mark.parametrize("room", [1, 2, 3])
def test_what_does_not_fit_goes_and_the_least_recently_used_first(room: int) -> None:
    session, model = make(limit=room * LONG)
    chats = [text(seed) for seed in range(4)]
    for chat in chats:
        read(session, model, chat)
        assert session.parked_bytes <= room * LONG
    assert session.num_parked == min(room, 3)
    # The last one is in the cache; before it, `room` of them are parked.
    for number in range(4 - 1 - room, 4):
        assert session.count_unread([*chats[number], 1]) == 1
    for number in range(4 - 1 - room):
        assert session.count_unread([*chats[number], 1]) == LONG + 1


def test_going_on_with_a_sequence_makes_it_the_latest() -> None:
    session, model = make(limit=2 * LONG + 10)
    chats = [text(seed) for seed in range(3)]
    for chat in chats:
        read(session, model, chat)
    assert read(session, model, [*chats[0], 1]) == 1
    read(session, model, text(3))  # takes the place of number 1
    assert session.count_unread([*chats[1], 1]) == LONG + 1
    assert session.count_unread([*chats[2], 1]) == 1
    assert session.count_unread([*chats[0], 1, 1]) == 1


def test_two_sequences_change_places_within_room_for_one() -> None:
    session, model = make(limit=LONG + 40)
    one, two = text(0), text(1)
    read(session, model, one)
    read(session, model, two)
    for _ in range(3):
        one, two = [*one, 1], [*two, 2]
        assert read(session, model, one) == 1
        assert read(session, model, two) == 1


def test_a_sequence_that_is_larger_than_the_room_displaces_no_other() -> None:
    session, model = make(limit=LONG)
    small, large = text(0), text(1, 3 * LONG)
    read(session, model, small)
    read(session, model, large)
    read(session, model, text(2, 20))
    assert session.count_unread([*small, 1]) == 1
    assert session.count_unread([*large, 1]) == 3 * LONG + 1


def test_a_few_tokens_are_neither_kept_nor_fetched() -> None:
    session, model = make()
    few = WORTH_PARKING - 1
    assert read(session, model, text(0, few)) == few
    assert read(session, model, text(1, few)) == few
    assert session.num_parked == 0
    read(session, model, text(1, few) + text(2))
    assert read(session, model, text(1, few) + text(3)) <= LONG
    assert session.num_parked == 1


def test_one_that_begins_like_a_parked_one_starts_there_and_leaves_it_parked() -> None:
    session, model = make()
    system = text(7, 100)
    one, two = text(0, 200, prefix=system), text(1, 200)
    read(session, model, one)
    read(session, model, two)
    assert read(session, model, text(2, 200, prefix=system)) <= 100
    assert read(session, model, [*one, 1]) == 1
    assert read(session, model, [*two, 1]) == 1


def test_a_sequence_is_parked_once_whatever_its_length() -> None:
    session, model = make()
    chat = text(0, 100)
    for turn in range(5):
        chat += text(turn, 20)
        read(session, model, chat)
        read(session, model, text(99))
    assert session.num_parked == 1


def test_drafts_that_are_rejected_park_nothing() -> None:
    session, model = make()
    chat = text(0)
    for turn in range(30):
        session.decode([*chat, *text(turn, 5)], rows=6)
        chat.append(turn % 16)
    assert session.num_parked == 0
    assert model.num_decoded < LONG + 30 * 6 + 6


@pytest.mark.parametrize("interrupt", ["cancelled", "failed", "keyboard"])
def test_an_interrupted_decode_costs_no_parked_sequence(interrupt: str, monkeypatch: pytest.MonkeyPatch) -> None:
    session, model = make()
    one, two = text(0), text(1)
    read(session, model, one)
    if interrupt == "cancelled":
        with pytest.raises(GenerationCancelled):
            session.decode(two, chunk=8, on_progress=lambda done, _: done < 80)
    else:
        decode = model.decode

        def fail(tokens: Sequence[int], *, rows: int = 1, want: Output = Output.LOGITS) -> Decoded:
            decode(tokens, rows=rows, want=want)
            raise BackendError("no") if interrupt == "failed" else KeyboardInterrupt

        monkeypatch.setattr(model, "decode", fail)
        with pytest.raises((BackendError, KeyboardInterrupt)):
            session.decode(two)
        monkeypatch.undo()
    assert read(session, model, [*one, 1]) == 1
    assert read(session, model, two) <= LONG


@pytest.mark.parametrize("error", [BackendError("no"), KeyboardInterrupt()])
@pytest.mark.parametrize("call", ["park", "swap", "resume"])
def test_an_interrupted_change_of_places_is_read_again(
    call: str, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    session, model = make()
    one, two, three = text(0), text(1), text(2)
    read(session, model, one)
    read(session, model, two)

    def fail(*_: object) -> Parked:
        model.tokens = [0, 1, 2]
        raise error

    if call == "resume":
        read(session, model, [3] * 10)  # too few to be parked for it
    monkeypatch.setattr(model, call, fail)
    with pytest.raises(type(error)):
        session.decode(three if call == "park" else [*one, 1])
    monkeypatch.undo()
    for chat in (one, two, three, one, two):
        read(session, model, chat)


def test_want_of_memory_costs_only_what_would_have_been_parked(monkeypatch: pytest.MonkeyPatch) -> None:
    session, model = make()
    one, two = text(0), text(1)
    read(session, model, one)
    read(session, model, two)

    def refuse(*_: object) -> Parked:
        raise BackendMemoryError("no memory")

    for call in ("park", "swap"):
        monkeypatch.setattr(model, call, refuse)
    assert read(session, model, [*one, 1]) == 1
    assert read(session, model, [*two, 1]) == LONG + 1


def test_a_refused_rollback_is_read_again_and_what_is_parked_serves() -> None:
    session, model = make(max_rollback=0)
    one, two = text(0), text(1)
    read(session, model, one)
    read(session, model, two)
    assert read(session, model, [*one, 1]) == 1
    assert read(session, model, [*two, 1]) == 1
    refused = session.num_refused_rollbacks
    assert read(session, model, [*two[:-3], 1, 2, 3]) == LONG
    assert session.num_refused_rollbacks == refused + 1
    assert read(session, model, [*one, 1, 1]) == 1


def test_a_smaller_window_gives_up_what_is_longer() -> None:
    session, model = make()
    long, short = text(0, 300), text(1, 100)
    for chat in (long, short, text(2, 90)):
        read(session, model, chat)
    session.resize(200)
    assert session.num_parked == 1
    assert read(session, model, [*short, 1]) == 1


def test_forgetting_forgets_what_is_parked_and_closing_frees_it() -> None:
    session, model = make()
    read(session, model, text(0))
    read(session, model, text(1))
    session.forget()
    assert (session.num_parked, session.parked_bytes) == (0, 0)
    assert read(session, model, text(0)) == LONG
    read(session, model, text(1))
    session.stop_parking()
    assert session.num_parked == 0
    read(session, model, text(0))
    assert session.num_parked == 0
    session.close()


def test_a_context_that_has_lost_tokens_is_resumed_as_it_was() -> None:
    model = SeeingLM(n_ctx=256)
    session = Session(model, parked_bytes=10**6)
    one, hole = text(0, 150), Hole(4, tuple(text(0, 150)[4:60]), 90)
    left = [*one[:4], *one[60:]]
    session.decode(one)
    session.decode([*left, 1], holes=[hole])
    session.decode(text(1, 150))
    before = model.num_decoded
    logits = session.decode([*left, 1, 2], holes=[hole]).logits[0].copy()
    assert model.num_decoded == before + 1
    np.testing.assert_array_equal(logits, fresh([*left, 1, 2], [hole]))
    logits = session.decode([*left, 1, 2]).logits[0].copy()  # the same tokens, which never had others before them
    np.testing.assert_array_equal(logits, fresh([*left, 1, 2], []))


@pytest.mark.parametrize("loose", [0, 5, LOOSE_END])
@pytest.mark.parametrize("exact", [True, False])
def test_a_chat_that_drops_old_turns_parks_nothing_and_displaces_nobody(exact: bool, loose: int) -> None:
    """`loose`: tokens at the end of each turn's cache that the next turn does not have."""
    model = FakeLM(n_ctx=512, order=None)
    session = Session(model, exact=exact, parked_bytes=450)
    other, chat = text(0, 300), text(1, 300)
    session.decode(other)
    session.decode(chat)
    for turn in range(8):
        session.decode([*chat, *text(50 + turn, loose)])
        chat = [*chat[:20], *chat[120:], *text(2 + turn, 100)]
        session.decode(chat)
        assert session.num_parked == 1
        assert session.count_unread([*other, 1]) == 1


def test_a_chat_that_comes_back_without_old_turns_leaves_nothing_parked_of_what_it_was() -> None:
    session, model = make()
    one, two = text(1, 300), text(2)
    read(session, model, one)
    read(session, model, two)
    read(session, model, [*one[:100], *one[200:], *text(3, 50)])  # 100 tokens of what is parked serve it
    assert session.num_parked == 1
    read(session, model, two)
    read(session, model, [*one[:20], *one[220:], *text(3, 50), *text(4)])  # none of it is worth resuming
    assert session.num_parked == 1
    assert session.count_unread([*two, 1]) == 1


def test_a_text_that_two_sequences_have_in_their_middle_makes_neither_the_others_past() -> None:
    session, model = make()
    document = text(0, 200)
    one, two = ([*text(seed, 20), *document, *text(seed, 40)] for seed in (1, 2))
    read(session, model, one)
    read(session, model, two)
    assert read(session, model, [*one, 1]) == 1


@pytest.mark.parametrize("exact", [True, False])
def test_an_eviction_of_its_own_text_parks_nothing(exact: bool) -> None:
    model = FakeLM(n_ctx=512, order=None)
    session = Session(model, exact=exact, parked_bytes=450)
    other, chat, holes = text(9, 300), text(0, 300), list[Hole]()
    session.decode(other)
    session.decode(chat)
    for turn in range(5):
        holes.append(Hole(4, tuple(chat[4:204]), len(chat) - 200))
        chat = [*chat[:4], *chat[204:], 1]
        assert session.count_unread(chat, holes) == 1
        session.decode(chat, holes=holes)
        assert session.num_parked == 1
        chat += text(turn + 1, 199)
        session.decode(chat, holes=holes)
        assert session.num_parked == 1
    assert session.count_unread([*other, 1]) == 1


def test_a_hole_that_cannot_be_made_again_parks_no_chat_at_every_step() -> None:
    model = SeeingLM(n_ctx=512)
    session = Session(model, parked_bytes=10**6)
    chat = text(0, 400)
    session.decode(chat)
    hole, chat = Hole(4, tuple(chat[4:204]), 200), [*chat[:4], *chat[204:], 1]
    session.decode(chat, holes=[hole])
    session.resize(300)
    session.forget()
    for token in range(20):
        chat.append(token % 16)
        session.decode(chat, holes=[hole])
    assert session.num_parked == 0
    assert model.num_decoded < 400 + 1 + len(chat) + 20


def test_what_cannot_be_shortened_serves_only_what_goes_on_with_all_of_it() -> None:
    session, model = make(max_rollback=0)
    system = text(7, 100)
    one, two = text(0, 200, prefix=system), text(1, 200)
    read(session, model, one)
    read(session, model, two)
    alike = text(2, 200, prefix=system)
    assert session.count_unread(alike) == 200
    assert read(session, model, alike) == 200
    assert session.num_refused_rollbacks == 0, "the one that begins alike was not resumed in vain"
    assert read(session, model, [*one, 1]) == 1
    read(session, model, [*two, 1])
    read(session, model, [*one[:-20], *text(3, 20)])  # shares all but 20 tokens with the parked one, which stays
    read(session, model, text(4))
    assert session.count_unread([*one, 1, 1]) == 1
    assert session.count_unread([*one[:-20], *text(3, 20), 1]) == 1


def test_a_score_parks_what_it_displaces_and_keeps_the_limit() -> None:
    session, model = make(limit=2 * LONG)
    chats = [text(seed) for seed in range(3)]
    for chat in chats:
        read(session, model, chat)
    session.score(text(9))
    assert session.parked_bytes <= 2 * LONG
    assert session.count_unread([*chats[2], 1]) == 1
    assert session.count_unread([*chats[0], 1]) == LONG + 1


def test_a_generation_that_begins_anew_resumes_nothing_and_costs_no_parked_sequence() -> None:
    session, model = make()
    one, two = text(0), text(1)
    for chat in (one, two, text(2)):
        read(session, model, chat)
    for _ in range(2):
        session.begin(anew=True)
        assert session.count_unread([*one, 1]) == LONG + 1
        assert read(session, model, [*one, 1]) == LONG + 1
        assert read(session, model, [*one, 1, 1]) == 1
    session.begin(anew=False)
    for chat in (two, one):
        assert read(session, model, [*chat, 1, 1, 1]) <= 3


def test_a_resize_that_fails_leaves_nothing_parked(monkeypatch: pytest.MonkeyPatch) -> None:
    session, model = make()
    one, two = text(0), text(1)
    read(session, model, one)
    read(session, model, two)

    def fail(n_ctx: int) -> None:
        raise BackendMemoryError("no memory")

    monkeypatch.setattr(model, "resize", fail)
    with pytest.raises(BackendMemoryError):
        session.resize(400)
    assert session.num_parked == 0
    assert read(session, model, [*one, 1]) == LONG + 1


def test_what_does_not_fit_itself_takes_the_place_of_none() -> None:
    session, model = make(limit=300)
    one = text(0, 250)
    read(session, model, one)
    few = WORTH_PARKING - 4
    for sequence in ([*one[: -few - 4], 3], one[:-few], [*one, *text(1, 200)]):  # the cache comes to hold it once more
        read(session, model, sequence)
        assert session.num_parked == 1
    read(session, model, text(2))
    assert session.count_unread([*one, 1]) == 1


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("limit", [0, 150, 10**6])
def test_logits_are_those_of_the_named_context_whoever_had_the_cache(seed: int, limit: int) -> None:
    """Conversations that branch, lose tokens and take turns at random."""
    rng = np.random.default_rng(seed)
    model = SeeingLM(n_ctx=160)
    session = Session(model, parked_bytes=limit)
    chats: list[Stretch] = [Stretch([1, 2, 3])]
    for _ in range(50):
        chat = chats[rng.integers(len(chats))]
        new = rng.integers(0, 16, rng.integers(1, 60)).tolist()
        chat = read_on(chat, new, 140, Sinks(sinks=int(rng.integers(0, 5)), low=0.6))
        logits = session.decode(chat.ids, holes=chat.holes, chunk=int(rng.integers(1, 30))).logits[0]
        np.testing.assert_array_equal(logits, fresh(chat.ids, chat.holes))
        assert session.parked_bytes <= limit
        chats = [*chats[-4:], chat]


@pytest.mark.parametrize("seed", range(4))
def test_a_draft_resumes_too(seed: int) -> None:
    rng = np.random.default_rng(seed)
    model = FakeLM(n_ctx=160, order=None)
    session = Session(model, exact=False, parked_bytes=300)
    chats: list[Stretch] = [Stretch([1, 2, 3])]
    for _ in range(50):
        chat = chats[rng.integers(len(chats))]
        new = rng.integers(0, 16, rng.integers(1, 60)).tolist()
        chat = read_on(chat, new, 140, Sinks(sinks=int(rng.integers(0, 5)), low=0.6))
        logits = session.decode(chat.ids, holes=chat.holes).logits[0]
        np.testing.assert_array_equal(logits, model.logits_after(chat.ids))
        assert session.parked_bytes <= 300
        chats = [*chats[-4:], chat]
