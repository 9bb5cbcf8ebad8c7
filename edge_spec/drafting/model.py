"""A small model drafts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from time import perf_counter
from typing import Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from edge_spec.decoding.drafter import Drafter, Request
from edge_spec.decoding.history import History
from edge_spec.decoding.sampling import Sampler, draw, make_sampler
from edge_spec.decoding.session import Session
from edge_spec.types import TOP_K, Context, Draft, Hole, Logits, Output, SparseProbs, TopK

Row: TypeAlias = tuple[NDArray[np.int64], Logits, np.float32]
"""The likeliest tokens at one position: ids, their logits, the log of the sum over all of the vocabulary."""


class Pace(Protocol):
    """Decides how long a draft gets. `confidence` holds the highest probability of each distribution so far.

    A decision may depend on the distributions but never on what was drawn from them: dropping a token for what it is
    would make its q a lie. So a token is judged before it is drawn, and what was drawn stays in the draft.
    """

    def worth_drafting(self, confidence: Sequence[float]) -> bool:
        """Whether to run the model once more, behind tokens of such confidence."""
        ...

    def worth_verifying(self, confidence: Sequence[float]) -> bool:
        """Whether to add a token from the last of these distributions to the draft."""
        ...


class ModelDrafter(Drafter):
    """Drafts with a model that shares the target's vocabulary, through a `Session` of its own.

    Greedy at temperature 0. Else each token is sampled after the same penalties, temperature and filters as the
    target's, from the `TOP_K` tokens that are most likely before them; that very distribution is the draft's q.

    A draft has `draft_tokens` tokens, or as many as `pace` says where that is set, after `start`. Owns the session and
    closes its model. The model may be unloaded in the middle of a generation, which then goes on without drafts.
    """

    name = "model"

    def __init__(self, session: Session, *, draft_tokens: int = 3) -> None:
        self._session = session
        self._draft_tokens = draft_tokens
        self.pace: Pace | None = None
        self.passes: list[tuple[int, float]] = []
        """Of the latest draft: tokens that each pass read, and its seconds."""
        self._request: Request | None = None
        self._sampler: Sampler | None = None
        self._history: History | None = None
        self._holes: tuple[Hole, ...] = ()
        self._num_reached = 0
        self._lost = False

    @property
    def is_unloaded(self) -> bool:
        """Whether the model was given up; nothing is drafted then."""
        return self._session.is_closed

    def unload(self) -> None:
        """Give the model's memory back for good; not while a pass is running."""
        self._session.close()

    @property
    def session(self) -> Session:
        """The draft model and what it has read."""
        return self._session

    def start(self, request: Request) -> None:
        """Take over the sampling; what the model has read stays read. The pace is free again."""
        self.pace = None
        # The draft's passes are not padded, so its last bits depend on how it read the prompt: it reads it anew.
        self._session.begin(anew=request.is_repeatable)
        sampling = request.sampling
        self._sampler = make_sampler(sampling if sampling.top_k < TOP_K else replace(sampling, top_k=0))
        self._request = request
        self._history = None
        self._holes = request.holes
        self._num_reached = 0
        self._lost = False

    def count_unread(self, context: Context) -> int:
        """Tokens that the model would have to read before it could draft."""
        return self._session.count_unread(context, self._holes)

    def evict(self, context: Context, hole: Hole) -> None:
        """The model's cache loses the same, if it has read it."""
        history = self._follow(context)
        history.evict(hole.start, hole.end)
        self._holes = (*self._holes, hole)
        self._num_reached = max(0, self._num_reached - len(hole.tokens))

    def propose(self, context: Context, max_tokens: int) -> Draft:
        """Draft one token a pass. No tokens where the context has outgrown the draft model's window."""
        request, sampler, session = self._request, self._sampler, self._session
        assert request is not None, "start() comes first"
        assert sampler is not None
        history = self._follow(context)
        begins, new = self._num_reached == 0, context[self._num_reached :]
        self._num_reached = len(context)
        if max(new, default=0) >= session.spec.n_vocab:
            self._lost = True  # a token of the target's padding: this model cannot read on
        if self._lost or self.is_unloaded:
            return Draft([], source=self.name)
        session.reach(new, anew=begins)
        room = min(max_tokens, session.spec.n_ctx - len(context) + 1)
        if self.pace is None:
            room = min(room, self._draft_tokens)

        tokens: list[int] = []
        q: list[SparseProbs] = []
        confidence: list[float] = []
        self.passes = []
        while len(tokens) < room:
            if not self._is_known(history) and self.pace is not None and not self.pace.worth_drafting(confidence):
                break
            ids, logits, log_sum = self._likeliest(history, request)
            if not len(ids):
                break
            probs = None if sampler.greedy else sampler.probs(logits, history, ids)
            token = sampler.choose(logits, history, ids) if probs is None else -1
            if self.pace is not None:
                likely = np.exp(logits[ids == token] - log_sum) if probs is None else probs.probs
                confidence.append(float(likely.max()))
                if not self.pace.worth_verifying(confidence):
                    break
            if probs is not None:
                token = draw(probs, request.rng)
                q.append(probs)
            tokens.append(token)
            history.append(token)
            if token in request.stop_ids:
                break
        spent_s = sum(seconds for _, seconds in self.passes)
        return Draft(tokens, None if sampler.greedy else q, self.name, confidence[: len(tokens)], spent_s)

    def _follow(self, context: Context) -> History:
        """The history, made that of `context`."""
        assert self._request is not None, "start() comes first"
        if self._history is None:
            self._history = History(context[: self._request.prompt_length])
        self._history.follow(context)
        return self._history

    def _is_known(self, history: History) -> bool:  # noqa: ARG002 - for those that look ahead
        """Whether `_likeliest` needs no pass of the model."""
        return False

    def _likeliest(self, history: History, request: Request) -> Row:
        """The likeliest tokens after `history`."""
        return known_part(self._pass(history.tokens, 1, request), 0, request)

    def _pass(self, tokens: list[int], rows: int, request: Request) -> TopK:
        """The likeliest tokens after each of the last `rows` of `tokens`, by a pass of the model."""
        started, read_before = perf_counter(), self._session.num_read
        decoded = self._session.decode(
            tokens,
            rows=rows,
            want=Output.TOP_K,
            holes=self._holes,
            on_progress=lambda _done, _total: not request.cancelled(),
        )
        self.passes.append((self._session.num_read - read_before, perf_counter() - started))
        assert decoded.top is not None, "it was wanted"
        return decoded.top

    def close(self) -> None:
        """Close the draft model."""
        self._session.close()


def known_part(top: TopK, row: int, request: Request) -> Row:
    """What the target knows of a row: the draft's padding may be longer."""
    ids = top.ids[row]
    if ids.max(initial=0) < request.n_vocab:
        return ids, top.logits[row], top.log_sum[row]
    known = ids < request.n_vocab
    return ids[known], top.logits[row, known], top.log_sum[row]
