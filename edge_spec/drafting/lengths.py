"""How long an answer gets nobody knows; how long it lasts at least can be bet on."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from math import inf

_KEPT = 16
_PRIOR_WEIGHT, _PRIOR_TAIL = 1.0, 0.35
"""In answers: what stands for those that are not known. One of n tokens goes on for x more with (n / (n + x)) ** tail,
whatever n is. With a tail of 1 an answer of any length never seems worth reading a prompt for."""
_SURE = 0.72
"""Chance with which an answer should last as long as is said. Replayed on recorded answers: 0.6 loses more by answers
that end early than it wins by others, 0.8 waits too long."""


class AnswerLengths:
    """The lengths of the latest answers, in tokens, and what they say of one that is being written."""

    def __init__(self, lengths: Iterable[int] = ()) -> None:
        self._lengths = deque(lengths, maxlen=_KEPT)

    def __iter__(self) -> Iterator[int]:
        """The oldest first."""
        return iter(self._lengths)

    def add(self, length: int) -> None:
        """An answer ended after `length` tokens."""
        self._lengths.append(length)

    def left(self, written: int) -> float:
        """Tokens that an answer of `written` tokens so far will at least go on for, as far as that is likely."""
        later = sorted(length - written for length in self._lengths if length >= written)
        needed = _SURE * (_PRIOR_WEIGHT + len(later))
        # The chance falls with each answer that ended and, by the prior, in between: on each stretch it is solved for.
        best = 0.0
        for ended, end in enumerate([*later, inf]):
            missing = needed - (len(later) - ended)
            bound = written * ((_PRIOR_WEIGHT / missing) ** (1 / _PRIOR_TAIL) - 1) if missing > 0 else inf
            best = max(best, min(bound, end))
        return best
