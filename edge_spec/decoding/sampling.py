"""From a row of logits to a token, or to the distribution that a token is drawn from.

A `Sampler` is two lists of steps: *edits* change logits of the whole vocabulary (penalties; a bias or a mask would be
one more), then *filters* drop candidates (top-k, top-p, min-p). Greedy sampling runs the edits and takes the maximum.
Everything is written for rows of 150,000 entries that are wanted several times a step: no sort of a whole row, and a
softmax only over the candidates that are left.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from edge_spec.backends.top_k import largest, require_numbers
from edge_spec.decoding.history import History
from edge_spec.types import Logits, SamplingParams, SparseProbs

Ids: TypeAlias = NDArray[np.int64]
"""Distinct tokens, int64 [k]."""

Edit: TypeAlias = Callable[[Logits, History, Ids | None], Logits]
"""Returns changed logits of the tokens `ids`, None: of the whole vocabulary; must not write into its argument, which
is the model's own buffer."""

_COLDEST = 1e-5  # below this a float32 logit cannot tell its neighbours apart, and the division overflows


@dataclass(frozen=True, slots=True)
class Candidates:
    """The tokens that are still in question. `ids` None: the whole vocabulary, else increasing int64 [k].

    `scores`: float32 [k], logits over temperature minus their maximum, so the highest is 0 as long as it is kept.
    """

    ids: NDArray[np.int64] | None
    scores: Logits

    def take(self, positions: NDArray[np.int64]) -> Candidates:
        """Only the candidates at `positions` (increasing)."""
        return Candidates(positions if self.ids is None else self.ids[positions], self.scores[positions])


Filter: TypeAlias = Callable[[Candidates], Candidates]


@dataclass(frozen=True, slots=True)
class Sampler:
    """How the next token is chosen; built by `make_sampler`."""

    edits: Sequence[Edit]
    temperature: float
    filters: Sequence[Filter]

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken and no randomness used."""
        return self.temperature == 0

    def choose(self, logits: Logits, history: History, ids: Ids | None = None) -> int:
        """The most likely token after the edits. Raises BackendError where the logits are not numbers.

        `logits` are of the tokens `ids`, None: of the whole vocabulary.
        """
        best = _argmax(self._edit(logits, history, ids))
        return best if ids is None else int(ids[best])

    def probs(self, logits: Logits, history: History, ids: Ids | None = None) -> SparseProbs:
        """The distribution (ids increasing) after all steps. Raises BackendError where the logits are not numbers.

        `logits` are of the tokens `ids`, and no other has a chance; None: of the whole vocabulary.
        """
        if ids is not None:
            order = np.argsort(ids)
            ids, logits = ids[order], logits[order]
        logits = self._edit(logits, history, ids)
        best = _argmax(logits)
        candidates = Candidates(ids, (logits - logits[best]) / np.float32(max(self.temperature, _COLDEST)))
        for keep in self.filters:
            candidates = keep(candidates)
        return _softmax(candidates)

    def _edit(self, logits: Logits, history: History, ids: Ids | None) -> Logits:
        for edit in self.edits:
            logits = edit(logits, history, ids)
        return logits


def make_sampler(params: SamplingParams) -> Sampler:
    """The sampler that `params` describe; steps that would do nothing are left out."""
    edits: list[Edit] = []
    if params.repetition_penalty != 1:
        edits.append(RepetitionPenalty(params.repetition_penalty))
    if params.presence_penalty or params.frequency_penalty:
        edits.append(OccurrencePenalty(params.presence_penalty, params.frequency_penalty))
    filters: list[Filter] = []
    if params.top_k:
        filters.append(TopK(params.top_k))
    if params.top_p < 1:
        filters.append(TopP(params.top_p))
    if params.min_p:
        filters.append(MinP(params.min_p))
    return Sampler(edits, params.temperature, filters)


def draw(probs: SparseProbs, rng: np.random.Generator) -> int:
    """One id, drawn by inverting the cumulative distribution."""
    cumulative = np.cumsum(probs.probs)
    position = int(np.searchsorted(cumulative, rng.random() * cumulative[-1], side="right"))
    return int(probs.ids[min(position, len(cumulative) - 1)])


@dataclass(frozen=True, slots=True)
class RepetitionPenalty:
    """Divides positive and multiplies negative logits of all tokens in the context (CTRL, arXiv 1909.05858)."""

    penalty: float

    def __call__(self, logits: Logits, history: History, ids: Ids | None = None) -> Logits:
        """Changed logits."""
        logits, (places, _) = logits.copy(), _find(history.context_ids, logits, ids)
        seen = logits[places]
        logits[places] = np.where(seen > 0, seen / np.float32(self.penalty), seen * np.float32(self.penalty))
        return logits


@dataclass(frozen=True, slots=True)
class OccurrencePenalty:
    """Subtracts `presence` once and `frequency` for each occurrence from logits of generated tokens."""

    presence: float
    frequency: float

    def __call__(self, logits: Logits, history: History, ids: Ids | None = None) -> Logits:
        """Changed logits."""
        logits, (places, known) = logits.copy(), _find(history.generated_ids, logits, ids)
        occurrences = history.generated_counts[known]
        logits[places] -= np.float32(self.presence) + np.float32(self.frequency) * occurrences
        return logits


@dataclass(frozen=True, slots=True)
class TopK:
    """Keeps the k most likely tokens."""

    k: int

    def __call__(self, candidates: Candidates) -> Candidates:
        """The k most likely candidates; of equal ones at the edge, any."""
        if self.k >= len(candidates.scores):
            return candidates
        return candidates.take(largest(candidates.scores, self.k))


@dataclass(frozen=True, slots=True)
class TopP:
    """Keeps the smallest set of most likely tokens whose mass reaches p (arXiv 1904.09751)."""

    p: float

    def __call__(self, candidates: Candidates) -> Candidates:
        """The likeliest candidates that together reach p; at least one."""
        scores = candidates.scores
        weights = np.exp(scores)
        wanted = self.p * weights.sum(dtype=np.float64)
        for k in (64, 1024, 16384, len(scores)):  # almost always the first few dozen hold the mass
            top = largest(scores, min(k, len(scores)))
            top = top[np.argsort(-scores[top], kind="stable")]
            mass = np.cumsum(weights[top], dtype=np.float64)
            if mass[-1] >= wanted:
                break
        kept = top[: int(np.searchsorted(mass, wanted)) + 1]
        return candidates.take(np.sort(kept))


@dataclass(frozen=True, slots=True)
class MinP:
    """Drops tokens less likely than `min_p` times the most likely one (arXiv 2407.01082)."""

    min_p: float

    def __call__(self, candidates: Candidates) -> Candidates:
        """The candidates that are likely enough; the best one always is, if it is still there."""
        # A ratio of probabilities is a difference of scores, so nothing needs normalising; the highest score is 0.
        return candidates.take(np.flatnonzero(candidates.scores >= np.float32(np.log(self.min_p))))


def _find(tokens: Ids, logits: Logits, ids: Ids | None) -> tuple[Ids, Ids]:
    """Where `tokens` have a logit: places in `logits`, and those of `tokens` that have one."""
    if ids is None:
        known = np.flatnonzero(tokens < len(logits))  # a draft's vocabulary may lack the target's padded tail
        return tokens[known], known
    _, places, known = np.intersect1d(ids, tokens, assume_unique=True, return_indices=True)
    return places, known


def _argmax(logits: Logits) -> int:
    best = int(logits.argmax())
    # argmax stops at a NaN, so looking at the winner finds any NaN, any +inf, and a row of nothing but -inf.
    require_numbers(logits[best])
    return best


def _softmax(candidates: Candidates) -> SparseProbs:
    ids = _all_ids(len(candidates.scores)) if candidates.ids is None else candidates.ids
    probs = np.exp(candidates.scores).astype(np.float64)
    probs /= probs.sum()
    if not probs.all():
        possible = np.flatnonzero(probs)
        ids, probs = ids[possible], probs[possible]
    return SparseProbs(ids, probs)


@lru_cache(maxsize=4)
def _all_ids(n_vocab: int) -> NDArray[np.int64]:
    ids = np.arange(n_vocab, dtype=np.int64)
    ids.flags.writeable = False
    return ids
