"""Prompt lookup: what followed the same words before is likely to follow them again."""

from __future__ import annotations

from edge_spec.decoding.drafter import Drafter, Request
from edge_spec.decoding.prefix import common_prefix
from edge_spec.types import Context, Draft

_MAX_CANDIDATES = 16
"""Earlier places that one step looks at, latest first: bounds the cost where one pair of tokens is everywhere."""
_LONG_ENOUGH = 32
"""A match of this many tokens is not measured further."""


class LookupDrafter(Drafter):
    """Finds the longest earlier match of the context's end and proposes what followed it (arXiv 2304.04487).

    Of equally long matches the latest counts. A match of n tokens, at least `min_match`, proposes n tokens, at most
    `max_draft`: the longer the match, the surer its continuation. With `bold` it always proposes `max_draft`, for a
    planner to cut. The confidence of a token is the number of tokens before it that match.

    The index chains the places of each pair of tokens, as LZ77 compressors do. It grows and shrinks with the context
    at its end, so a step costs time by what changed, not by the context's length.
    """

    name = "lookup"

    def __init__(self, *, min_match: int = 2, max_draft: int = 10, bold: bool = False) -> None:
        assert min_match >= 2, "the index is over pairs"
        self._min_match = min_match
        self._max_draft = max_draft
        self._bold = bold
        self._stop_ids: frozenset[int] = frozenset()
        self._tokens: list[int] = []
        self._latest: dict[tuple[int, int], int] = {}  # pair -> position of its second token, where it came last
        self._earlier: list[int] = []  # position -> where the pair that ends there came before, or -1

    def start(self, request: Request) -> None:
        """Learn the stop ids. The index is kept: the next context often continues the last."""
        self._stop_ids = request.stop_ids

    def propose(self, context: Context, max_tokens: int) -> Draft:
        """What followed the longest match, as far as it is worth it."""
        self._follow(context if isinstance(context, list) else list(context))
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

    def close(self) -> None:
        """Forget the index."""
        self._tokens, self._latest, self._earlier = [], {}, []

    def _follow(self, context: list[int]) -> None:
        """Make the index that of `context`."""
        tokens, latest, earlier = self._tokens, self._latest, self._earlier
        shared = common_prefix(tokens, context)
        while len(tokens) > shared:
            pair = _last_pair(tokens)
            tokens.pop()
            before = earlier.pop()
            if before >= 0:
                latest[pair] = before
            else:
                latest.pop(pair, None)
        for token in context[shared:]:
            tokens.append(token)
            pair = _last_pair(tokens)
            earlier.append(latest.get(pair, -1))
            latest[pair] = len(tokens) - 1

    def _longest_match(self) -> tuple[int, int]:
        """Position of the last token of the longest earlier match of the context's end, and the match's length."""
        tokens = self._tokens
        last = len(tokens) - 1
        best_end, best_length = -1, 0
        end = self._earlier[last] if tokens else -1
        for _ in range(_MAX_CANDIDATES):
            if end < 0 or best_length >= _LONG_ENOUGH:
                break
            length = 2
            while length < _LONG_ENOUGH and length <= end and tokens[end - length] == tokens[last - length]:
                length += 1
            if length > best_length:
                best_end, best_length = end, length
            end = self._earlier[end]
        return best_end, best_length


def _last_pair(tokens: list[int]) -> tuple[int, int]:
    return (tokens[-2] if len(tokens) > 1 else -1, tokens[-1])
