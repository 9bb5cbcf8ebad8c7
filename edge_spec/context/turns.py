"""Whole turns go, the oldest first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from edge_spec.context.keeper import Answered, Asking
from edge_spec.context.transcript import Transcript, Turn
from edge_spec.types import Dropped, Prompt

_ARCHIVE_TOKENS = 8192
"""Dropped text that can still be copied from, the newest of it."""


@dataclass(frozen=True, slots=True)
class ByTurns:
    """Drops whole turns, oldest first, but for the first one, which often says what the rest is about.

    It drops more than it has to: each time the turns behind the gap have to be read again, so it is done seldom, and
    the turns in between read only what is new.
    """

    low: float = 0.5
    """Share of the window that a conversation fills at most after turns were dropped."""
    answer: float = 0.25
    """Share of the window that is kept free for an answer whose length is not known."""

    def room_for_answer(self, n_ctx: int, max_tokens: int | None) -> int:
        """Tokens that have to be free behind a question."""
        most = max(1, int(self.answer * n_ctx))
        return most if max_tokens is None else min(most, max_tokens)

    def count(self, length: Callable[[int], int], droppable: int, n_ctx: int, max_tokens: int | None) -> int:
        """How many of the `droppable` oldest turns have to go so that prompt and answer fit `n_ctx` tokens.

        `length(k)`: tokens of the prompt without the k oldest; asked for few k. The latest turn is spared where that
        leaves room for an answer. What the count leaves may still not fit: then nothing does.
        """
        room = n_ctx - self.room_for_answer(n_ctx, max_tokens)
        if length(0) <= room:
            return 0
        return self.count_down_to(length, droppable, min(room, int(self.low * n_ctx)), spare=room)

    def count_down_to(self, length: Callable[[int], int], droppable: int, tokens: int, *, spare: int = 0) -> int:
        """The fewest oldest turns that leave at most `tokens`; the latest is spared if `spare` tokens hold it."""
        for k in range(droppable):
            if length(k) <= tokens:
                return k
        if droppable and length(droppable - 1) <= spare:
            return droppable - 1
        return droppable


@dataclass(frozen=True, slots=True)
class WholeTurns:
    """Lets whole turns go from a prompt while it is answered, where memory is short; implements `Eviction`.

    A full window ends the answer: its room was kept free beforehand.
    """

    start: int
    """Where the oldest turn that may go begins."""
    ends: tuple[int, ...]
    """Where each turn ends that may go."""
    policy = "turns"

    def span(self, length: int, n_ctx: int) -> tuple[int, int] | None:  # noqa: ARG002 - the protocol's
        """See `Eviction`. Nothing goes for a window's sake."""
        return None

    def span_down_to(self, length: int, max_tokens: int) -> tuple[int, int] | None:
        """See `Eviction`. The fewest oldest turns, or all of them."""
        for end in self.ends:
            if length - (end - self.start) <= max_tokens or end == self.ends[-1]:
                return self.start, end
        return None

    def after(self, start: int, end: int) -> WholeTurns:
        """See `Eviction`."""
        return WholeTurns(start, tuple(left - (end - start) for left in self.ends if left > end))

    def count(self, tokens: int) -> int:
        """How many oldest turns these `tokens` are."""
        return sum(end - self.start <= tokens for end in self.ends)


@dataclass(frozen=True, slots=True)
class _Kept:
    """What of the conversation is in the context, and what has gone from it."""

    turns: tuple[Turn, ...] = ()
    dropped_turns: int = 0
    dropped_tokens: int = 0
    dropped_texts: tuple[str, ...] = field(default=(), repr=False)
    archive: tuple[int, ...] = field(default=(), repr=False)

    @property
    def dropped(self) -> tuple[Dropped, ...]:
        """What has gone, for a result."""
        if not self.dropped_turns:
            return ()
        return (Dropped("turns", self.dropped_tokens, "\n".join(self.dropped_texts)),)

    @property
    def notes(self) -> tuple[str, ...]:
        """The same in a sentence."""
        if not self.dropped_turns:
            return ()
        turns = "1 earlier turn is" if self.dropped_turns == 1 else f"{self.dropped_turns} earlier turns are"
        return (f"{turns} no longer in the context ({self.dropped_tokens} tokens)",)


class TurnKeeper:
    """Keeps whole turns as ids; without a policy all of them, and a question too many does not fit."""

    def __init__(self, transcript: Transcript, policy: ByTurns | None) -> None:
        self._transcript = transcript
        self._policy = policy
        self._kept = _Kept()

    @property
    def turns(self) -> tuple[Turn, ...]:
        """Those in the context."""
        return self._kept.turns

    def reset(self) -> None:
        """Forget every turn."""
        self._kept = _Kept()

    def ask(self, question: str, *, n_ctx: int, max_tokens: int | None) -> Asking:
        """The turns that stay, and the question."""
        kept = self._kept
        if self._policy is not None and kept.turns:
            droppable = len(kept.turns) - 1
            count = self._policy.count(lambda k: self._length_without(k, question), droppable, n_ctx, max_tokens)
            kept = self._drop(kept, count, question)
            if count == droppable and self._length(kept.turns, question) >= n_ctx:
                kept = self._drop(kept, 0, question, pinned=0)  # the first turn too, before nothing can be said
        asked = self._transcript.ask(kept.turns, question)
        eviction = None
        if self._policy is not None and len(asked.starts) > 1:
            eviction = WholeTurns(asked.starts[0], asked.starts[1:])

        def settle(answered: Answered | None) -> None:
            self._kept = kept
            if answered is not None:
                if eviction is not None and answered.holes:
                    # What went in the middle of the answer stays away, and the next turn is read as if never there.
                    gone = eviction.count(sum(len(hole.tokens) for hole in answered.holes))
                    self._kept = self._drop(kept, gone, question)
                turn = Turn(question, answered.text, asked.asked, answered.ids, asked.is_whole)
                self._kept = replace(self._kept, turns=(*self._kept.turns, turn))

        return Asking(
            Prompt(asked.ids, eviction=eviction, archive=kept.archive, dropped=kept.dropped, notes=kept.notes), settle
        )

    def prune(self, max_tokens: int) -> int:
        """Drop turns but the first."""
        if self._policy is None:
            return 0
        before = self._kept.dropped_tokens
        droppable = max(0, len(self._kept.turns) - 1)
        count = self._policy.count_down_to(lambda k: self._length_without(k, ""), droppable, max_tokens)
        self._kept = self._drop(self._kept, count, "")
        return self._kept.dropped_tokens - before

    def _length_without(self, count: int, question: str) -> int:
        """Tokens of a prompt without the `count` oldest turns behind the first."""
        turns = self._kept.turns
        return self._length((*turns[:1], *turns[1 + count :]), question)

    def _length(self, turns: tuple[Turn, ...], question: str) -> int:
        return len(self._transcript.ask(turns, question).ids)

    def _drop(self, kept: _Kept, count: int, question: str, *, pinned: int = 1) -> _Kept:
        """Without the first turn unless it is pinned, and without the `count` turns behind it."""
        gone = kept.turns[pinned : 1 + count]
        if not gone:
            return kept
        left = (*kept.turns[:pinned], *kept.turns[1 + count :])
        archive = [*kept.archive, *(token for turn in gone for token in self._transcript.copyable(turn))]
        return _Kept(
            left,
            kept.dropped_turns + len(gone),
            kept.dropped_tokens + self._length(kept.turns, question) - self._length(left, question),
            (*kept.dropped_texts, *(turn.text for turn in gone)),
            tuple(archive[-_ARCHIVE_TOKENS:]),
        )
