"""How a cache that has lost tokens and a context that has compare: which holes they share, and what serves."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

from edge_spec.decoding.prefix import common_prefix
from edge_spec.types import Hole


@dataclass(slots=True)
class Cached:
    """The tokens of a cached sequence, and what it has lost, oldest first."""

    tokens: list[int]
    holes: list[Hole] = field(default_factory=list)

    def num_known(self, holes: Sequence[Hole]) -> int:
        """How many of `holes`, from the oldest on, it has."""
        known = 0
        for have, wanted in zip(self.holes, holes, strict=False):
            if have != wanted:
                break
            known += 1
        return known

    def num_kept(self, sequence: list[int], holes: Sequence[Hole], *, exact: bool) -> int:
        """How many of its tokens serve a sequence with such holes: behind other holes none does.

        `exact`: as in `Session`.
        """
        others = self.holes[self.num_known(holes) :] if exact else []
        limit = min([hole.start for hole in others], default=sys.maxsize)
        stages, first = self._stages(sequence, holes, exact=exact)
        return min(limit, common_prefix(self.tokens, stages[first]))

    def count_unread(self, sequence: list[int], holes: Sequence[Hole], *, exact: bool) -> int:
        """Tokens that would have to be read to make it `sequence`, with those that its holes need."""
        stages, first = self._stages(sequence, holes, exact=exact)
        unread = len(stages[first]) - common_prefix(self.tokens, stages[first])
        return unread + sum(len(stages[i + 1]) - holes[i].read for i in range(first, len(stages) - 1))

    def _stages(self, sequence: list[int], holes: Sequence[Hole], *, exact: bool) -> tuple[list[list[int]], int]:
        """What a sequence was when each hole was made, and which of that the cache goes on from."""
        known = self.num_known(holes)
        if known == len(holes):
            return [sequence], 0
        stages = unfold(sequence, holes)
        # A draft evicts only what it has read; a hole that it has read nothing of is to it as if it had been there.
        while not exact and known < len(holes) and common_prefix(self.tokens, stages[known]) < holes[known].end:
            known += 1
        return stages, known


def unfold(sequence: list[int], holes: Sequence[Hole]) -> list[list[int]]:
    """What had been read when each hole was made, oldest first and without the older ones' tokens; then `sequence`."""
    stages = [sequence]
    for hole in reversed(holes):
        left = stages[0]
        stages.insert(0, [*left[: hole.start], *hole.tokens, *left[hole.start : hole.read]])
    return stages
