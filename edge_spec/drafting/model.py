"""A small model drafts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from edge_spec.decoding.drafter import Drafter, Request
from edge_spec.decoding.history import History
from edge_spec.decoding.sampling import Sampler, draw, make_sampler
from edge_spec.decoding.session import Session
from edge_spec.types import Context, Draft, Logits, SparseProbs

_MAX_SUPPORT = 64
"""Drafts are sampled from at most this many tokens: the tail is slow to handle and seldom accepted."""


class ModelDrafter(Drafter):
    """Drafts with a model that shares the target's vocabulary, through a `Session` of its own.

    Greedy at temperature 0. Else each token is sampled after the same penalties, temperature and filters as the
    target's, from the 64 most likely tokens at most; that very distribution is the draft's q.

    `draft_tokens`: the longest draft. `min_probability`: a draft ends before a position where the model gives its own
    most likely token less than this. Owns the session and closes its model.
    """

    name = "model"

    def __init__(self, session: Session, *, draft_tokens: int = 3, min_probability: float = 0.0) -> None:
        self._session = session
        self._draft_tokens = draft_tokens
        self._min_probability = min_probability
        self._request: Request | None = None
        self._sampler: Sampler | None = None
        self._history: History | None = None

    @property
    def session(self) -> Session:
        """The draft model and what it has read."""
        return self._session

    def start(self, request: Request) -> None:
        """Take over the sampling; what the model has read stays read."""
        sampling = request.sampling
        top_k = min(sampling.top_k or _MAX_SUPPORT, _MAX_SUPPORT)
        self._sampler = make_sampler(replace(sampling, top_k=top_k))
        self._request = request
        self._history = None

    def propose(self, context: Context, max_tokens: int) -> Draft:
        """Draft one token a pass. No tokens where the context has outgrown the draft model's window."""
        request, sampler, session = self._request, self._sampler, self._session
        assert request is not None, "start() comes first"
        assert sampler is not None
        if self._history is None:
            self._history = History(context[: request.prompt_length])
        history = self._history
        history.follow(context)
        room = min(max_tokens, self._draft_tokens, session.spec.n_ctx - len(context) + 1)

        tokens: list[int] = []
        q: list[SparseProbs] = []
        while len(tokens) < room:
            decoded = session.decode(history.tokens, on_progress=lambda _done, _total: not request.cancelled())
            logits = decoded.logits[0, : request.n_vocab]
            # Whether to go on may depend on the distribution, but never on what was drawn from it: dropping a token
            # for what it is would make q a lie.
            if sampler.greedy:
                token = sampler.choose(logits, history)
                if self._min_probability and _probability(logits, token) < self._min_probability:
                    break
            else:
                probs = sampler.probs(logits, history)
                if probs.probs.max() < self._min_probability:
                    break
                token = draw(probs, request.rng)
                q.append(probs)
            tokens.append(token)
            history.append(token)
            if token in request.stop_ids:
                break
        return Draft(tokens, None if sampler.greedy else q, self.name)

    def close(self) -> None:
        """Close the draft model."""
        self._session.close()


def _probability(logits: Logits, token: int) -> float:
    """Softmax at one entry, in float32."""
    best = logits.max()
    return float(np.exp(logits[token] - best) / np.exp(logits - best).sum())
