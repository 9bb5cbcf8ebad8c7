"""What a model expects at each position of a text, kept small, and how far another model is from it.

Of every distribution the reference's `KEPT` likeliest tokens are kept with their log-probabilities, and the mass of
all others as one number. The Kullback-Leibler divergence is that of these coarser distributions: it never exceeds the
exact one (the data-processing inequality), and falls short only by what the two models disagree on within the rest,
whose mass is given beside it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edge_spec.quality.contender import Contender
from edge_spec.types import Logits

KEPT = 256
_LEAST_MASS = 1e-12


@dataclass(frozen=True, slots=True)
class Passage:
    """Token ids, of which those from `start` on are predicted by what is before them; 1 <= start < len(ids)."""

    ids: tuple[int, ...]
    start: int

    @property
    def n_predicted(self) -> int:
        """Number of positions that are scored."""
        return len(self.ids) - self.start


@dataclass(frozen=True, slots=True)
class Expected:
    """The reference at every scored position of some passages, in their order.

    `tokens` int32 [positions, KEPT], likeliest first; `log_probs` float32, alike; `rest` float32 [positions], the
    logarithm of the others' mass; `actual` float64 [positions], log-probability of the token that the text goes on
    with.
    """

    tokens: NDArray[np.int32]
    log_probs: NDArray[np.float32]
    rest: NDArray[np.float32]
    actual: NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Compared:
    """Another model at the same positions: arrays [positions]."""

    actual: NDArray[np.float64]
    """Log-probability of the token that the text goes on with."""
    agrees: NDArray[np.bool_]
    """Whether its likeliest token is the reference's."""
    divergence: NDArray[np.float64]
    """Divergence of its distribution from the reference's, nats."""


def expect(contender: Contender, passages: Sequence[Passage]) -> Expected:
    """What the reference expects."""
    parts = []
    for logits, following in _scored(contender, passages):
        log_total = log_normalisers(logits)
        kept = min(KEPT, logits.shape[1])
        top = np.argpartition(logits, -kept, axis=1)[:, -kept:]
        scores = np.take_along_axis(logits, top, 1)
        # Of equal logits the first token is the greedy one.
        order = np.lexsort((top, -scores), axis=1)
        top, scores = np.take_along_axis(top, order, 1), np.take_along_axis(scores, order, 1)
        log_probs = scores - log_total[:, None]
        parts.append(
            Expected(
                top.astype(np.int32),
                log_probs.astype(np.float32),
                _rest(log_probs).astype(np.float32),
                _actual(logits, following, log_total),
            )
        )
    return Expected(*(np.concatenate([getattr(part, name) for part in parts]) for name in Expected.__slots__))


def compare(contender: Contender, passages: Sequence[Passage], expected: Expected) -> Compared:
    """How a model compares with what the reference expects at the same positions."""
    actual, agrees, divergence, at = [], [], [], 0
    for logits, following in _scored(contender, passages):
        here = slice(at, at + len(logits))
        at += len(logits)
        log_total = log_normalisers(logits)
        theirs = np.take_along_axis(logits, expected.tokens[here].astype(np.int64), 1) - log_total[:, None]
        agrees.append(logits.argmax(axis=1) == expected.tokens[here, 0])
        actual.append(_actual(logits, following, log_total))
        divergence.append(_divergence(expected.log_probs[here], expected.rest[here], theirs))
    return Compared(np.concatenate(actual), np.concatenate(agrees), np.concatenate(divergence))


def log_normalisers(logits: Logits) -> NDArray[np.float64]:
    """Logarithm of the sum of exponentials of each row, float64 [rows]."""
    top = logits.max(axis=1, keepdims=True)
    return np.asarray(top[:, 0] + np.log(np.exp(logits - top).sum(axis=1, dtype=np.float64)), np.float64)


def _rest(log_probs: NDArray[np.float64]) -> NDArray[np.float64]:
    """Logarithm of the mass that is left beside these tokens."""
    return np.asarray(np.log(np.maximum(1 - np.exp(log_probs).sum(axis=1), _LEAST_MASS)))


def _divergence(
    log_p: NDArray[np.float32], log_p_rest: NDArray[np.float32], log_q: NDArray[np.float64]
) -> NDArray[np.float64]:
    p, p_rest = np.exp(log_p.astype(np.float64)), np.exp(log_p_rest.astype(np.float64))
    divergence = (p * (log_p - log_q)).sum(axis=1) + p_rest * (log_p_rest - _rest(log_q))
    return np.asarray(np.maximum(divergence, 0))


def _actual(logits: Logits, following: Sequence[int], log_total: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(logits[np.arange(len(logits)), list(following)] - log_total, np.float64)


def _scored(contender: Contender, passages: Sequence[Passage]) -> Iterator[tuple[Logits, Sequence[int]]]:
    """Logits of the scored positions, some at a time, and the tokens that follow them."""
    for passage in passages:
        for at, logits in contender.rows(passage.ids[:-1], passage.start - 1):
            yield logits, passage.ids[at + 1 : at + 1 + len(logits)]
