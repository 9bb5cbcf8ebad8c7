"""Verification: greedy acceptance by table, exact rejection sampling by statistics."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from edge_spec.decoding.history import History
from edge_spec.decoding.sampling import draw, make_sampler
from edge_spec.decoding.verify import verify
from edge_spec.errors import BackendError
from edge_spec.types import Decoded, Draft, SamplingParams, SparseProbs, Verdict
from tests.reference import assert_drawn_from, distribution

GREEDY = make_sampler(SamplingParams())


def peaked(*tokens: int, n_vocab: int = 6) -> Decoded:
    logits = np.zeros((len(tokens), n_vocab), np.float32)
    logits[np.arange(len(tokens)), tokens] = 5
    return Decoded(logits)


@pytest.mark.parametrize(
    ("drafted", "target", "verdict"),
    [
        ([], [4], Verdict(0, 4)),
        ([1], [1, 2], Verdict(1, 2)),
        ([1], [3, 2], Verdict(0, 3)),
        ([1, 2, 3], [1, 2, 3, 4], Verdict(3, 4)),
        ([1, 2, 3], [1, 5, 3, 4], Verdict(1, 5)),
        ([1, 2, 3], [0, 2, 3, 4], Verdict(0, 0)),
    ],
)
def test_greedy_accepts_what_the_target_would_write(drafted: list[int], target: list[int], verdict: Verdict) -> None:
    assert verify(Draft(drafted), peaked(*target), GREEDY, np.random.default_rng(0), History([0])) == verdict


def test_each_row_sees_the_accepted_drafts_before_it() -> None:
    """The target would write 1 again, but for the penalty on the drafted 1."""
    sampler = make_sampler(SamplingParams(presence_penalty=10))
    history = History([1])
    assert verify(Draft([1]), peaked(1, 1), sampler, np.random.default_rng(0), history) == Verdict(1, 0)
    assert history.tokens == [1]
    assert history.generated_ids.tolist() == []


def test_greedy_uses_no_randomness() -> None:
    rng = np.random.default_rng(7)
    verify(Draft([1, 2]), peaked(1, 3, 2), GREEDY, rng, History([0]))
    assert rng.random() == np.random.default_rng(7).random()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_numbers_leave_the_history_alone(temperature: float) -> None:
    rows = peaked(1, 2)
    rows.logits[1, 3] = np.nan
    history = History([0])
    q = [SparseProbs(np.array([1]), np.array([1.0]))]
    sampler = make_sampler(SamplingParams(temperature=temperature, top_k=1))
    with pytest.raises(BackendError):
        verify(Draft([1], q), rows, sampler, np.random.default_rng(0), history)
    assert history.tokens == [0]


def test_what_the_target_cannot_write_is_never_accepted() -> None:
    sampler = make_sampler(SamplingParams(temperature=1, top_k=1))
    for seed in range(50):
        verdict = verify(Draft([2]), peaked(1, 1), sampler, np.random.default_rng(seed), History([0]))
        assert verdict == Verdict(0, 1)


def test_what_the_target_must_write_is_always_accepted() -> None:
    sampler = make_sampler(SamplingParams(temperature=1, top_k=1))
    q = [SparseProbs(np.array([1, 2]), np.array([0.5, 0.5]))]
    for seed in range(50):
        assert verify(Draft([1], q), peaked(1, 4), sampler, np.random.default_rng(seed), History([0])).num_accepted == 1


SHAPES = {
    "plain": SamplingParams(temperature=1),
    "cold": SamplingParams(temperature=0.6),
    "top-k": SamplingParams(temperature=1, top_k=5),
    "top-p": SamplingParams(temperature=1, top_p=0.8),
    "min-p": SamplingParams(temperature=1, min_p=0.15),
    "all": SamplingParams(
        temperature=1.3, repetition_penalty=1.2, presence_penalty=0.2, top_k=7, top_p=0.95, min_p=0.02
    ),
}


@pytest.mark.parametrize("q_kind", ["one-hot", "flat", "near", "disjoint", "unordered"])
@pytest.mark.parametrize("params", SHAPES.values(), ids=SHAPES)
def test_the_token_is_drawn_from_the_target_whatever_the_draft(params: SamplingParams, q_kind: str) -> None:
    """Odds of failing by chance: one in a million a case (the seeds are fixed)."""
    rng = np.random.default_rng([len(q_kind), params.top_k])
    logits = (1.5 * rng.standard_normal((2, 8))).astype(np.float32)
    history = History([3, 1])
    p = distribution(logits[0], [3, 1], [], params)
    near = np.array([0.7, 0.3]) @ np.stack([p, np.full(8, 1 / 8)])
    q = {
        "one-hot": None,
        "flat": SparseProbs(np.arange(8), np.full(8, 1 / 8)),
        "near": SparseProbs(np.arange(8), near / near.sum()),
        "disjoint": SparseProbs(np.argsort(p)[:2], np.array([0.5, 0.5])),
        "unordered": SparseProbs(np.array([6, 2, 7, 0]), np.array([0.4, 0.3, 0.2, 0.1])),
    }[q_kind]
    sampler = make_sampler(params)
    counts: Counter[tuple[int, ...]] = Counter()
    for _ in range(1500):
        token = int(np.argsort(p)[-2]) if q is None else draw(q, rng)
        draft = Draft([token], None if q is None else [q])
        verdict = verify(draft, Decoded(logits), sampler, rng, history)
        counts[(token if verdict.num_accepted else verdict.next_token,)] += 1
    assert_drawn_from(counts, {(int(token),): float(p[token]) for token in np.flatnonzero(p)})
