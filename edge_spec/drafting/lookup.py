"""Prompt lookup: what followed the same words before is likely to follow them again."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Generic, TypeVar

from edge_spec.decoding.drafter import Drafter, Request
from edge_spec.decoding.prefix import common_prefix
from edge_spec.types import Context, Draft, Hole

_MAX_CANDIDATES = 16
"""Earlier places that one step looks at, latest first: bounds the cost where one pair of tokens is everywhere."""
_LONG_ENOUGH = 32
"""A match of this many tokens is not measured further."""


class LookupDrafter(Drafter):
    """Finds the longest earlier match of the context's end and proposes what followed it (arXiv 2304.04487).

    Of equally long matches the latest counts. A match of n tokens, at least `min_match`, proposes n tokens, at most
    `max_draft`: the longer the match, the surer its continuation. With `bold` it always proposes `max_draft`, for a
    planner to cut. The confidence of a token is the number of tokens before it that match.

    What the context has lost counts as standing before it.

    The index chains the places of each pair of tokens, as LZ77 compressors do. It grows and shrinks with the context
    at its end, so a step costs time by what changed, not by the context's length.
    """

    name = "lookup"

    def __init__(self, *, min_match: int = 2, max_draft: int = 10, bold: bool = False) -> None:
        self._min_match = min_match
        self._max_draft = max_draft
        self._bold = bold
        self._stop_ids: frozenset[int] = frozenset()
        self._archive: list[int] = []
        self._tokens: list[int] = []
        self._pairs: _Places[tuple[int, int]] = _Places()
        self._singles: _Places[int] = _Places()

    def start(self, request: Request) -> None:
        """Learn the stop ids and what was lost. The index is kept: the next context often continues the last."""
        self._stop_ids = request.stop_ids
        self._archive = list(request.archive)

    def propose(self, context: Context, max_tokens: int) -> Draft:
        """What followed the longest match, as far as it is worth it."""
        self._follow([*self._archive, *context])
        end, length = self._longest_match()
        if length < self._min_match:
            return Draft([], source=self.name)
        wanted = min(max_tokens, self._max_draft, self._max_draft if self._bold else length)
        # A match that overlaps the context's end repeats with its distance as the period.
        period = len(self._tokens) - 1 - end
        draft: list[int] = []
        for i in range(wanted):
            draft.append(self._tokens[end + 1 + i % period])
            if draft[-1] in self._stop_ids:
                break
        return Draft(draft, source=self.name, confidence=[float(length + i) for i in range(len(draft))])

    def evict(self, context: Context, hole: Hole) -> None:  # noqa: ARG002 - the protocol's signature
        """What goes can be copied from as before."""
        self._archive += hole.tokens

    def close(self) -> None:
        """Forget the index."""
        self._archive = []
        self._tokens, self._pairs, self._singles = [], _Places(), _Places()

    def _follow(self, context: list[int]) -> None:
        """Make the index that of `context`."""
        tokens = self._tokens
        shared = common_prefix(tokens, context)
        while len(tokens) > shared:
            self._pairs.pop(_last_pair(tokens))
            self._singles.pop(tokens.pop())
        for token in context[shared:]:
            tokens.append(token)
            self._pairs.push(_last_pair(tokens))
            self._singles.push(token)

    def _longest_match(self) -> tuple[int, int]:
        """Position of the last token of the longest earlier match of the context's end, and the match's length."""
        tokens = self._tokens
        last = len(tokens) - 1
        best_end, best_length = -1, 0
        end = self._pairs.before(last)
        for _ in range(_MAX_CANDIDATES):
            if end < 0 or best_length >= _LONG_ENOUGH:
                break
            length = 2
            while length < _LONG_ENOUGH and length <= end and tokens[end - length] == tokens[last - length]:
                length += 1
            if length > best_length:
                best_end, best_length = end, length
            end = self._pairs.before(end)
        if best_length == 0 and (end := self._singles.before(last)) >= 0:
            return end, 1
        return best_end, best_length


K = TypeVar("K", bound=Hashable)


class _Places(Generic[K]):
    """Where each key came, latest first, for a sequence that grows and shrinks at its end."""

    def __init__(self) -> None:
        self._latest: dict[K, int] = {}
        self._earlier: list[int] = []  # position -> where its key came before, or -1

    def before(self, position: int) -> int:
        """Where the key at `position` came before; -1 if it did not."""
        return self._earlier[position] if position >= 0 else -1

    def push(self, key: K) -> None:
        """The next position has this key."""
        self._earlier.append(self._latest.get(key, -1))
        self._latest[key] = len(self._earlier) - 1

    def pop(self, key: K) -> None:
        """The last position, which has this key, goes."""
        before = self._earlier.pop()
        if before >= 0:
            self._latest[key] = before
        else:
            del self._latest[key]


def _last_pair(tokens: list[int]) -> tuple[int, int]:
    return (tokens[-2] if len(tokens) > 1 else -1, tokens[-1])
