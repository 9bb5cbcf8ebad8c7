"""Copying from texts that the caller gives: a retrieved passage, the file that is being edited."""

from __future__ import annotations

from collections.abc import Sequence

from edge_spec.decoding.drafter import Drafter, Request
from edge_spec.drafting.corpus import Corpus
from edge_spec.types import Context, Draft


class CopyDrafter(Drafter):
    """Proposes what follows the longest match of the context's end in `corpora`, which whoever inherits fills.

    A match of n tokens, at least `min_match`, proposes n tokens, at most `max_draft`; with `bold` it always proposes
    `max_draft`, for a planner to cut. The confidence of a token is the number of tokens before it that match.
    """

    def __init__(self, *, min_match: int, max_draft: int, bold: bool) -> None:
        self._min_match = min_match
        self._max_draft = max_draft
        self._bold = bold
        self._stop_ids: frozenset[int] = frozenset()
        self.corpora: list[Corpus] = []
        """The latest counts where matches are equally long."""

    def start(self, request: Request) -> None:
        """Learn the stop ids."""
        self._stop_ids = request.stop_ids

    def propose(self, context: Context, max_tokens: int) -> Draft:
        """What follows the longest match, as far as it is worth it."""
        corpus, end, length = None, 0, 0
        for candidate in reversed(self.corpora):
            found = candidate.find(context)
            if found[1] > length:
                corpus, (end, length) = candidate, found
        if corpus is None or length < self._min_match:
            return Draft([], source=self.name)
        wanted = min(max_tokens, self._max_draft, self._max_draft if self._bold else length)
        tokens = corpus.read(end, wanted)
        for i, token in enumerate(tokens):
            if token in self._stop_ids:
                tokens = tokens[: i + 1]
                break
        return Draft(tokens, source=self.name, confidence=[float(length + i) for i in range(len(tokens))])

    def close(self) -> None:
        """Forget the texts."""
        self.corpora = []


class ReferenceDrafter(CopyDrafter):
    """Copies spans of the request's references (inference with reference, arXiv 2304.04487)."""

    name = "reference"

    def __init__(self, *, min_match: int = 2, max_draft: int = 10, bold: bool = False) -> None:
        super().__init__(min_match=min_match, max_draft=max_draft, bold=bold)
        self._order = min(min_match, 3)
        self._indexed: Sequence[Sequence[int]] = ()

    def start(self, request: Request) -> None:
        """Index the references, unless they are those of the last generation."""
        super().start(request)
        if request.references != self._indexed or not self.corpora:
            self._indexed = request.references
            self.corpora = [Corpus(request.references, order=self._order)] if request.references else []
