"""What the target makes of a draft."""

from __future__ import annotations

import numpy as np

from edge_spec.decoding.history import History
from edge_spec.decoding.sampling import Sampler, draw
from edge_spec.types import Decoded, Draft, SparseProbs, Verdict


def verify(draft: Draft, rows: Decoded, sampler: Sampler, rng: np.random.Generator, history: History) -> Verdict:
    """Accept the beginning of `draft` that stands and choose the token after it.

    `rows`: the target's logits, shape [1 + len(draft.tokens), n_vocab]; row i follows `history` and i drafted tokens.
    Greedy: a drafted token stands if it is the target's own choice. Else rejection sampling (arXiv 2211.17192 and
    2302.01318), which leaves the target's distribution p as it is whatever the draft's q: accept with u < p/q, u drawn
    from [0, 1); after a rejection draw from the normalised positive part of p - q. `history` is as before on return.

    Raises BackendError where the logits are not numbers.
    """
    assert len(rows.logits) == len(draft.tokens) + 1, (len(rows.logits), len(draft.tokens))
    length = len(history)
    judge = _judge_greedy if sampler.greedy else _judge_sampled
    try:
        return judge(draft, rows, sampler, rng, history)
    finally:
        history.truncate(length)


def _judge_greedy(
    draft: Draft, rows: Decoded, sampler: Sampler, _rng: np.random.Generator, history: History
) -> Verdict:
    for i, token in enumerate(draft.tokens):
        chosen = sampler.choose(rows.logits[i], history)
        if chosen != token:
            return Verdict(i, chosen)
        history.append(token)
    return Verdict(len(draft.tokens), sampler.choose(rows.logits[-1], history))


def _judge_sampled(
    draft: Draft, rows: Decoded, sampler: Sampler, rng: np.random.Generator, history: History
) -> Verdict:
    for i, token in enumerate(draft.tokens):
        p = sampler.probs(rows.logits[i], history)
        q = _one_hot(token) if draft.q is None else draft.q[i]
        if not rng.random() < _probability(p, token) / _probability(q, token):
            return Verdict(i, draw(_residual(p, q), rng))
        history.append(token)
    return Verdict(len(draft.tokens), draw(sampler.probs(rows.logits[-1], history), rng))


def _one_hot(token: int) -> SparseProbs:
    return SparseProbs(np.array([token]), np.array([1.0]))


def _probability(probs: SparseProbs, token: int) -> float:
    return float(probs.probs[probs.ids == token].sum())


def _residual(p: SparseProbs, q: SparseProbs) -> SparseProbs:
    """The positive part of p - q, normalised. The ids of p increase; those of q need not."""
    positions = np.searchsorted(p.ids, q.ids)
    shared = positions < len(p.ids)
    shared[shared] = p.ids[positions[shared]] == q.ids[shared]
    rest = p.probs.copy()
    rest[positions[shared]] -= q.probs[shared]
    kept = np.flatnonzero(rest > 0)
    if not len(kept):
        return p  # p and q differ by rounding only
    return SparseProbs(p.ids[kept], rest[kept] / rest[kept].sum())
