"""Whole turns go, the oldest first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


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
