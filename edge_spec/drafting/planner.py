"""Chooses, step by step, who drafts and how much, by what it costs and what it is likely to bring.

The text is given, only the way through it is not: a step that covers n tokens in s seconds is worth n - rate * s, where
the rate is that at which the same tokens could be had otherwise, by plain decoding or, if that is clearly faster, by
drafts of the model of one length. Lookups are not part of it: where text repeats it repeats whatever was chosen before.
Drafting nothing is a choice like any other.

That goes by expectations, and one answer may disappoint them all. So what can be lost is bounded too: see `Purse`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from operator import mul

from edge_spec.decoding.drafter import Drafter, Request
from edge_spec.drafting.acceptance import Acceptance, Scale
from edge_spec.drafting.costs import Costs
from edge_spec.drafting.history import HistoryDrafter
from edge_spec.drafting.lengths import AnswerLengths
from edge_spec.drafting.lookup import LookupDrafter
from edge_spec.drafting.model import ModelDrafter
from edge_spec.drafting.purse import Purse
from edge_spec.types import Context, Draft, Hole, Verdict

LOOKUP_SCALE: Scale = ((1, 0.2), (2, 0.45), (3, 0.6), (4, 0.7), (6, 0.78), (9, 0.85), (14, 0.9), (24, 0.95))
"""A lookup's confidence is the length of the match behind a token."""
HISTORY_SCALE: Scale = ((3, 0.3), (4, 0.4), (6, 0.55), (9, 0.7), (14, 0.85), (24, 0.93))
"""The same of a history, whose texts are about other things."""
MODEL_SCALE: Scale = ((0.0, 0.26), (0.3, 0.47), (0.5, 0.68), (0.7, 0.83), (0.85, 0.93), (0.95, 0.975), (0.99, 0.995))
"""A model's confidence is the probability that it gives its most likely token."""

_MODEL = "model"
"""Its chances stand under this name between runs, whatever the drafter is called."""
_WRITTEN, _UNCOPIED = 16, 10
"""What a generation starts from: of so many tokens, so many are not copied. Only those profit from what the model has
read."""


class Book:
    """What was learnt: costs, chances, and how long answers get."""

    def __init__(self, costs: Costs) -> None:
        self.costs = costs
        self.copies: defaultdict[str, Acceptance] = defaultdict(lambda: Acceptance(LOOKUP_SCALE))
        self.copies[HistoryDrafter.name] = Acceptance(HISTORY_SCALE)
        """By drafter: that one's matches may be worth more than another's, however long they are."""
        self.model = Acceptance(MODEL_SCALE)
        self.lengths = AnswerLengths()
        self.rate = 0.0
        """Tokens a second of plain decoding, or of fixed drafts of the model if those pay; see `set_rate`."""

    def set_rate(self, max_draft: int, reading_s: float = 0.0) -> bool:
        """Find the rate for drafts of up to `max_draft` tokens of the model; returns whether it is one of the model's.

        `reading_s`: what has to be paid for reading, for each token that profits from it.
        """
        self.rate, length = self.costs.best_fixed(self.model.mean, max_draft, reading_s)
        return length > 0

    def to_json(self) -> dict[str, object]:
        """For the next run; empty if nothing was learnt."""
        costs, lengths = self.costs.to_json(), list(self.lengths)
        if not costs and not lengths:
            return {}
        chances = {name: chance.to_json() for name, chance in [(_MODEL, self.model), *self.copies.items()]}
        return costs | {"lengths": lengths, "chances": chances}

    def restore(self, kept: Mapping[str, object], copiers: Iterable[str]) -> None:
        """Start from what `to_json` gave; what does not fit is ignored, since it is only a better guess."""
        self.costs.restore(kept)
        lengths, chances = kept.get("lengths"), kept.get("chances")
        if isinstance(lengths, list) and all(type(length) is int and length > 0 for length in lengths):
            self.lengths = AnswerLengths(lengths)
        if isinstance(chances, dict):
            self.model.restore(chances.get(_MODEL))
            for name in copiers:
                self.copies[name].restore(chances.get(name))

    def cost(self, drafted: int, passes: int = 0) -> float:
        """What a step with so many drafted tokens, after `passes` of the model, takes, in plain passes."""
        return (self.costs.target_s(drafted + 1) + passes * self.costs.draft_s) / self.costs.target_s(1)

    def worth(self, chances: Sequence[float], extra_s: float = 0.0) -> float:
        """What a step with a draft of such chances (each given the ones before) is worth, in tokens."""
        tokens = 1 + sum(accumulate(chances, mul))
        return float(tokens) - self.rate * (self.costs.target_s(len(chances) + 1) + extra_s)


def lessons_of_texts(kept: object) -> dict[str, object]:
    """Of what `Book.to_json` gave, what is no matter of the machine."""
    return {name: kept[name] for name in ("lengths", "chances") if name in kept} if isinstance(kept, dict) else {}


class Planner(Drafter):
    """Lookup costs nothing and is asked first; the model is asked where it is expected to pay more.

    `more` are further drafters that cost nothing, with the same kind of confidence as lookup's; of all their drafts
    the one that is worth most counts. `costs` are learnt on the way. A generation with a seed at a temperature plans by
    the fixed guesses of a fresh `Costs` instead: clocks would otherwise decide how many random numbers are drawn, and
    the same seed would not give the same text.
    """

    name = "auto"

    def __init__(
        self,
        costs: Costs,
        lookup: LookupDrafter,
        model: ModelDrafter | None,
        *,
        more: Sequence[Drafter] = (),
        fixed: Costs,
        max_draft: int = 7,
    ) -> None:
        self._learning = Book(costs)
        self._book = self._learning
        self._fixed = fixed
        self._is_fixed = False
        self._copiers = (lookup, *more)
        self._given_model = model
        self._max_draft = max_draft
        self._room = max_draft
        self._guesses: list[Draft] = []
        self._guessed_at = 0
        self._prompt_length = self._max_length = self._length = 0
        self._uncopied = _UNCOPIED
        self._purse = Purse()
        self._passes = 0
        """Of the model, for the draft of this step."""

    @property
    def _model(self) -> ModelDrafter | None:
        """The draft model, None where there is none, or none any more."""
        model = self._given_model
        return None if model is None or model.is_unloaded else model

    @property
    def costs(self) -> Costs:
        """What was learnt of the machine."""
        return self._learning.costs

    def to_json(self) -> dict[str, object]:
        """What was learnt, for the next run; empty if nothing was. What is being written counts as ended."""
        self._end_answer()
        return self._learning.to_json()

    def restore(self, kept: Mapping[str, object]) -> None:
        """Start from what `to_json` gave an earlier run."""
        self._learning.restore(kept, [copier.name for copier in self._copiers])

    def start(self, request: Request) -> None:
        """Start the drafters; what was learnt stays."""
        self._is_fixed = request.is_repeatable
        self._book = Book(self._fixed) if self._is_fixed else self._learning
        self._book.model.relax()
        self._end_answer()
        self._purse = Purse()
        self._guesses = []
        self._uncopied = _UNCOPIED
        self._prompt_length, self._max_length = request.prompt_length, request.max_length
        for copier in self._copiers:
            copier.start(request)
        if self._model is not None:
            self._model.start(request)
            self._model.pace = self

    def propose(self, context: Context, max_tokens: int) -> Draft:
        """The draft that is worth most, which may be none."""
        book = self._book
        self._learn_from_guesses(context)
        self._guesses = [copier.propose(context, max_tokens) for copier in self._copiers]
        self._guessed_at = len(context)
        self._room = min(max_tokens, self._max_draft)
        self._passes = 0
        book.costs.move(len(context))
        model, reading_s = self._model_to_ask(context)
        model_pays = book.set_rate(self._room if model else 0, reading_s)
        worth, copied = max(map(self._best_beginning, self._guesses), key=lambda valued: valued[0])
        # By the meaning of the rate, a step that the model drafts is worth about 0.
        if model is None or not model_pays or worth > 0:
            return copied
        draft = model.propose(context, self._room)
        self._passes = len(model.passes)
        if not self._is_fixed:
            for tokens_read, seconds in model.passes:
                book.costs.observe_draft(tokens_read, seconds)
        return draft

    def observe_prompt(self, tokens_read: int, seconds: float) -> None:
        """Learn what a token costs that is read with many others."""
        if not self._is_fixed:
            self._book.costs.observe_prompt(tokens_read, seconds)

    def observe(self, context: Context, draft: Draft, verdict: Verdict, target_s: float | None) -> None:  # noqa: ARG002
        """Learn what became of the draft and what the pass cost."""
        book = self._book
        written = verdict.num_accepted + 1
        self._length += written
        self._uncopied += 0 if draft.source in book.copies else written
        if self._given_model is not None and draft.source == self._given_model.name:
            book.model.observe_draft(draft.confidence, verdict.num_accepted)
        if target_s is None:
            return
        # What the model read for later steps too is not this one's loss.
        self._purse.settle(written, book.cost(len(draft.tokens), self._passes))
        if self._is_fixed:
            return
        book.costs.observe_target(len(draft.tokens) + 1, target_s)

    def evict(self, context: Context, hole: Hole) -> None:
        """Tell the drafters; a guess for what is gone proves nothing."""
        self._guesses = []
        for copier in self._copiers:
            copier.evict(context, hole)
        if self._model is not None:
            self._model.evict(context, hole)

    def close(self) -> None:
        """Close the drafters."""
        for copier in self._copiers:
            copier.close()
        if self._given_model is not None:
            self._given_model.close()

    # The model asks these while it drafts. What they go by may not depend on what was drawn (see `Pace`).

    def worth_drafting(self, confidence: Sequence[float]) -> bool:
        """Whether to pay for one or two more tokens behind tokens of such confidence."""
        book, mean = self._book, self._book.model.mean
        chances = book.model.chances(confidence)
        if not chances:
            return True  # or the model would not have been asked
        now, draft_s = book.worth(chances), book.costs.draft_s
        return any(
            book.worth([*chances, *[mean] * more], more * draft_s) > now
            for more in (1, 2)
            if self._may_have(len(chances) + more)
        )

    def worth_verifying(self, confidence: Sequence[float]) -> bool:
        """Whether the last token, of such confidence, should go to the target, perhaps for what may follow it."""
        book, mean = self._book, self._book.model.mean
        if not self._may_have(len(confidence)):
            return False
        *before, last = book.model.chances(confidence)
        now = book.worth(before)
        if book.worth([*before, last]) >= now:
            return True
        longer = len(confidence) + 1
        return self._may_have(longer) and book.worth([*before, last, mean], book.costs.draft_s) > now

    def _may_have(self, drafted: int) -> bool:
        """Whether the model's draft may have so many tokens."""
        return drafted <= self._room and self._purse.pays(self._book.cost(drafted, passes=drafted) - 1)

    def _model_to_ask(self, context: Context) -> tuple[ModelDrafter | None, float]:
        """The model, if it may be asked, and what it has to read, in seconds for each token that will profit from it.

        The first token waits for no draft model to read the prompt.
        """
        model, book = self._model, self._book
        if model is None or len(context) == self._prompt_length or not self._purse.pays(book.cost(1, passes=1) - 1):
            return None, 0.0
        reading_s = max(0, model.count_unread(context) - 2) * book.costs.read_s
        if not reading_s:
            return model, 0.0
        if not self._purse.pays_reading(reading_s / book.costs.target_s(1)):
            return None, 0.0
        tokens_left = min(self._max_length - len(context), book.lengths.left(self._length))
        return model, reading_s / max(1.0, tokens_left * self._uncopied / (_WRITTEN + self._length))

    def _end_answer(self) -> None:
        if self._length:
            self._learning.lengths.add(self._length)
        self._length = 0

    def _best_beginning(self, draft: Draft) -> tuple[float, Draft]:
        """What as much of a copied draft as is worth its rows is worth, by this book, and that much of it."""
        book = self._book
        chances = book.copies[draft.source].chances(draft.confidence)
        lengths = [n for n in range(len(chances) + 1) if self._purse.pays(book.cost(n) - 1)] or [0]
        worths = [book.worth(chances[:n]) for n in lengths]
        worth = max(worths)
        length = lengths[worths.index(worth)]
        return worth, Draft(draft.tokens[:length], confidence=draft.confidence[:length], source=draft.source)

    def _learn_from_guesses(self, context: Context) -> None:
        """What was copied can be judged by what was written, drafted or not: learning is free."""
        written = context[self._guessed_at :]
        for guess in self._guesses:
            acceptance = self._book.copies[guess.source]
            for token, confidence, actual in zip(guess.tokens, guess.confidence, written, strict=False):
                acceptance.observe(confidence, token == actual)
                if token != actual:
                    break
