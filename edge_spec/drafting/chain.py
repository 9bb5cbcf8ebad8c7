"""Asks several drafters in turn."""

from __future__ import annotations

from collections.abc import Sequence

from edge_spec.decoding.drafter import Drafter, Request
from edge_spec.types import Context, Draft, Verdict


class FirstOf(Drafter):
    """The first drafter that proposes anything is taken; each keeps to its own longest draft.

    Cheap and choosy drafters come first: a lookup, then a model. `Draft.source` says which one it was.
    """

    def __init__(self, drafters: Sequence[Drafter]) -> None:
        self._drafters = tuple(drafters)
        self.name = "+".join(drafter.name for drafter in self._drafters)

    def start(self, request: Request) -> None:
        """Start all."""
        for drafter in self._drafters:
            drafter.start(request)

    def propose(self, context: Context, max_tokens: int) -> Draft:
        """The first draft that has a token."""
        for drafter in self._drafters:
            draft = drafter.propose(context, max_tokens)
            if draft.tokens:
                return draft
        return Draft([])

    def observe(self, context: Context, draft: Draft, verdict: Verdict) -> None:
        """Tell all."""
        for drafter in self._drafters:
            drafter.observe(context, draft, verdict)

    def close(self) -> None:
        """Close all."""
        for drafter in self._drafters:
            drafter.close()
