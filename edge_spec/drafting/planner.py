"""Chooses, step by step, who drafts and how much, by what it costs and what it is likely to bring.

A step that yields n tokens in s seconds is worth n - rate * s, where the rate is what the generation achieves in
tokens a second: maximising that maximises the rate itself (the renewal-reward theorem; Dinkelbach's method finds the
best ratio the same way). Drafting nothing is a choice like any other.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from operator import mul

from edge_spec.decoding.drafter import Drafter, Request
from edge_spec.drafting.acceptance import Acceptance, Scale
from edge_spec.drafting.costs import Costs
from edge_spec.drafting.lookup import LookupDrafter
from edge_spec.drafting.model import ModelDrafter
from edge_spec.types import Context, Draft, Verdict

LOOKUP_SCALE: Scale = ((2, 0.3), (3, 0.45), (4, 0.55), (6, 0.7), (9, 0.8), (14, 0.88), (24, 0.94))
"""A lookup's confidence is the length of the match behind a token."""
MODEL_SCALE: Scale = ((0.0, 0.3), (0.3, 0.45), (0.5, 0.6), (0.7, 0.75), (0.85, 0.88), (0.95, 0.95), (0.99, 0.99))
"""A model's confidence is the probability that it gives its most likely token."""

_RATE_DECAY = 0.96
_PROBE_AFTER, _PROBE_AT_MOST = 16, 256
"""Steps without the model until it is tried again, doubling while it does not pay."""


class Book:
    """What was learnt: costs, chances, and the rate that they led to."""

    def __init__(self, costs: Costs) -> None:
        self.costs = costs
        self.lookup = Acceptance(LOOKUP_SCALE)
        self.model = Acceptance(MODEL_SCALE)
        self._tokens = 0.0
        self._seconds = 0.0

    @property
    def rate(self) -> float:
        """Tokens a second lately; at first those of plain decoding."""
        return self._tokens / self._seconds if self._seconds else 1 / self.costs.target_s(1)

    def earn(self, tokens: int, seconds: float) -> None:
        """A step brought so many tokens in so many seconds."""
        self._tokens = self._tokens * _RATE_DECAY + tokens
        self._seconds = self._seconds * _RATE_DECAY + seconds

    def worth(self, chances: Sequence[float], extra_s: float = 0.0) -> float:
        """What a step with a draft of such chances (each given the ones before) is worth, in tokens."""
        tokens = 1 + sum(accumulate(chances, mul))
        return float(tokens) - self.rate * (self.costs.target_s(len(chances) + 1) + extra_s)


class Planner(Drafter):
    """Lookup costs nothing and is asked first; the model is asked where it is expected to pay more.

    `costs` are learnt on the way. A generation with a seed at a temperature plans by the fixed guesses of a fresh
    `Costs` instead: clocks would otherwise decide how many random numbers are drawn, and the same seed would not give
    the same text.
    """

    name = "auto"

    def __init__(
        self, costs: Costs, lookup: LookupDrafter, model: ModelDrafter | None, *, fixed: Costs, max_draft: int = 7
    ) -> None:
        self._learning = Book(costs)
        self._book = self._learning
        self._fixed = fixed
        self._is_fixed = False
        self._lookup = lookup
        self._model = model
        self._max_draft = max_draft
        self._room = max_draft
        self._guess = Draft([])
        self._guess_at = 0
        self._idle_steps = 0
        self._probe_after = _PROBE_AFTER
        self._spent_s = 0.0

    @property
    def costs(self) -> Costs:
        """What was learnt of the machine."""
        return self._learning.costs

    def start(self, request: Request) -> None:
        """Start both drafters; what was learnt stays."""
        self._is_fixed = request.sampling.temperature > 0 and request.sampling.seed is not None
        self._book = Book(self._fixed) if self._is_fixed else self._learning
        self._guess, self._idle_steps, self._probe_after = Draft([]), 0, _PROBE_AFTER
        self._lookup.start(request)
        if self._model is not None:
            self._model.start(request)
            self._model.pace = self

    def propose(self, context: Context, max_tokens: int) -> Draft:
        """The draft that is worth most, which may be none."""
        book = self._book
        self._learn_from_guess(context)
        self._guess, self._guess_at = self._lookup.propose(context, max_tokens), len(context)
        copied = self._best_beginning(self._guess)
        best = book.worth([book.lookup.chance(value) for value in copied.confidence])
        self._spent_s = 0.0
        if self._model is None or not self._model_pays(context, max_tokens, best):
            self._idle_steps += 1
            return copied
        self._idle_steps = 0
        self._room = min(max_tokens, self._max_draft)
        draft = self._model.propose(context, self._room)
        for tokens_read, seconds in self._model.passes:
            self._spent_s += seconds
            if not self._is_fixed:
                book.costs.observe_draft(tokens_read, seconds)
        return draft

    def observe(self, context: Context, draft: Draft, verdict: Verdict, target_s: float | None) -> None:  # noqa: ARG002
        """Learn what became of the draft and what the pass cost."""
        book = self._book
        if draft.source == ModelDrafter.name:
            book.model.observe_draft(draft.confidence, verdict.num_accepted)
        if target_s is None or self._is_fixed:
            return
        book.costs.observe_target(len(draft.tokens) + 1, target_s)
        book.earn(verdict.num_accepted + 1, target_s + self._spent_s)

    def close(self) -> None:
        """Close both drafters."""
        self._lookup.close()
        if self._model is not None:
            self._model.close()

    # The model asks these while it drafts. What they go by may not depend on what was drawn (see `Pace`).

    def worth_drafting(self, confidence: Sequence[float]) -> bool:
        """Whether to pay for one or two more tokens behind tokens of such confidence."""
        book, mean = self._book, self._book.model.mean
        chances = [book.model.chance(value) for value in confidence]
        if not chances:
            return True  # or the model would not have been asked
        now, draft_s = book.worth(chances), book.costs.draft_s
        return any(
            book.worth([*chances, *[mean] * more], more * draft_s) > now
            for more in (1, 2)
            if len(chances) + more <= self._room
        )

    def worth_verifying(self, confidence: Sequence[float]) -> bool:
        """Whether the last token, of such confidence, should go to the target, perhaps for what may follow it."""
        book, mean = self._book, self._book.model.mean
        *before, last = (book.model.chance(value) for value in confidence)
        now = book.worth(before)
        if book.worth([*before, last]) >= now:
            return True
        return len(confidence) < self._room and book.worth([*before, last, mean], book.costs.draft_s) > now

    def _model_pays(self, context: Context, max_tokens: int, best: float) -> bool:
        """Whether the model's expected best draft beats `best`, or it is time to look again."""
        assert self._model is not None
        book, model = self._book, self._model
        unread = max(0, model.session.count_unread(context) - 1)
        # What has to be read first pays for all the steps that follow, of which there may be as many as tokens left.
        reading_s = unread * book.costs.read_s / max(1, min(max_tokens, 64) / 4)
        expected = max(
            book.worth([book.model.mean] * n, n * book.costs.draft_s + reading_s)
            for n in range(1, min(max_tokens, self._max_draft) + 1)
        )
        if expected > best:
            self._probe_after = _PROBE_AFTER
            return True
        if self._idle_steps < self._probe_after:
            return False
        self._probe_after = min(2 * self._probe_after, _PROBE_AT_MOST)
        return True

    def _best_beginning(self, draft: Draft) -> Draft:
        """As much of a lookup's draft as is worth its rows, by this book."""
        book = self._book
        chances = [book.lookup.chance(value) for value in draft.confidence]
        length = max(range(len(chances) + 1), key=lambda n: book.worth(chances[:n]))
        return Draft(draft.tokens[:length], confidence=draft.confidence[:length], source=draft.source)

    def _learn_from_guess(self, context: Context) -> None:
        """What a lookup would have drafted can be judged by what was written, drafted or not: learning is free."""
        written = context[self._guess_at :]
        for token, confidence, actual in zip(self._guess.tokens, self._guess.confidence, written, strict=False):
            self._book.lookup.observe(confidence, token == actual)
            if token != actual:
                break
