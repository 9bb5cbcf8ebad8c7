"""The draft model, itself drafted for: what the text repeats is guessed to it, and one pass checks several guesses."""

from __future__ import annotations

from edge_spec.decoding.drafter import Request
from edge_spec.decoding.history import History
from edge_spec.decoding.session import Session
from edge_spec.drafting.lookup import LookupDrafter
from edge_spec.drafting.model import ModelDrafter, Row, known_part
from edge_spec.types import Context, Draft, TopK

_SURE = 3
"""Tokens that have to match before more than one is guessed."""
_GUESSED, _GUESSED_SURELY = 1, 3
"""A draft's pass over two rows costs hardly more than one over one row, and one over four not two of them."""


class CascadeDrafter(ModelDrafter):
    """Drafts what `ModelDrafter` drafts, in fewer passes where the text repeats (cascade drafting, arXiv 2312.11462).

    A guess that the model does not draft costs a row; one that it does saves a pass.
    """

    name = "cascade"

    def __init__(self, session: Session, *, draft_tokens: int = 3) -> None:
        super().__init__(session, draft_tokens=draft_tokens)
        self._lookup = LookupDrafter(min_match=1, max_draft=_GUESSED_SURELY)
        self._guessed: list[int] = []
        self._top: TopK | None = None
        self._known_to = 0
        """Length of the context up to which the rows of the last pass go, as far as its guesses were right."""

    def start(self, request: Request) -> None:
        """See `ModelDrafter`."""
        super().start(request)
        self._lookup.start(request)

    def propose(self, context: Context, max_tokens: int) -> Draft:
        """See `ModelDrafter`."""
        self._top = None  # what was drafted last may have been rejected, and the rows behind it with it
        return super().propose(context, max_tokens)

    def close(self) -> None:
        """Close the draft model, and forget the index."""
        super().close()
        self._lookup.close()

    def _is_known(self, history: History) -> bool:
        row = len(history) - self._known_to
        return (
            self._top is not None and 0 < row <= len(self._guessed) and (history.tokens[-row:] == self._guessed[:row])
        )

    def _likeliest(self, history: History, request: Request) -> Row:
        if not self._is_known(history):
            self._guessed = self._guess(history)
            self._top = self._pass(history.tokens + self._guessed, 1 + len(self._guessed), request)
            self._known_to = len(history)
        assert self._top is not None
        return known_part(self._top, len(history) - self._known_to, request)

    def _guess(self, history: History) -> list[int]:
        room = min(self.session.spec.n_ctx - len(history), self.session.spec.max_rows - 1)
        draft = self._lookup.propose(history.tokens, _GUESSED_SURELY)
        if not draft.tokens or room < 1:
            return []
        return draft.tokens[: min(room, _GUESSED_SURELY if draft.confidence[0] >= _SURE else _GUESSED)]
