"""Sampling: every step against its plain definition, and the history that the penalties see."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest

from edge_spec.decoding.history import History
from edge_spec.decoding.sampling import draw, make_sampler
from edge_spec.errors import BackendError, UsageError
from edge_spec.types import SamplingParams, SparseProbs
from tests.reference import assert_drawn_from, distribution, penalised

PARAMS = [
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=0.3),
    SamplingParams(temperature=1.7, top_k=5),
    SamplingParams(temperature=1.0, top_k=10**9),
    SamplingParams(temperature=1.0, top_p=0.8),
    SamplingParams(temperature=1.0, top_p=1e-9),
    SamplingParams(temperature=1.0, min_p=0.1),
    SamplingParams(temperature=0.8, top_k=20, top_p=0.9, min_p=0.05),
    SamplingParams(temperature=0.8, repetition_penalty=1.3),
    SamplingParams(temperature=0.8, presence_penalty=0.7, frequency_penalty=0.4),
    SamplingParams(
        temperature=1.2, repetition_penalty=0.8, presence_penalty=-0.7, frequency_penalty=0.4, top_k=9, top_p=0.7
    ),
]


def dense(probs: SparseProbs, n_vocab: int) -> np.ndarray:
    out = np.zeros(n_vocab)
    out[probs.ids] = probs.probs
    return out


@pytest.mark.parametrize("params", PARAMS)
@pytest.mark.parametrize("n_vocab", [7, 300, 20_000])
def test_the_distribution_is_its_definition(params: SamplingParams, n_vocab: int) -> None:
    rng = np.random.default_rng(n_vocab)
    for _ in range(5):
        logits = (3 * rng.standard_normal(n_vocab)).astype(np.float32)
        history = History(rng.integers(0, n_vocab, 20).tolist())
        history.extend(rng.integers(0, min(5, n_vocab), 20).tolist())
        before = logits.copy()
        probs = make_sampler(params).probs(logits, history)
        prompt, generated = history.tokens[:20], history.tokens[20:]
        np.testing.assert_allclose(
            dense(probs, n_vocab), distribution(before, prompt, generated, params), rtol=2e-5, atol=1e-12
        )
        assert (np.diff(probs.ids) > 0).all()
        assert (probs.probs > 0).all()
        assert probs.probs.sum() == pytest.approx(1)
        np.testing.assert_array_equal(logits, before)  # the model's buffer is not written to


def test_greedy_is_the_most_likely_token_after_the_penalties() -> None:
    rng = np.random.default_rng(0)
    params = SamplingParams(repetition_penalty=1.5, presence_penalty=0.5, frequency_penalty=0.25, top_k=3, top_p=0.1)
    sampler = make_sampler(params)
    assert sampler.greedy
    changed = 0
    for _ in range(50):
        logits = rng.standard_normal(30).astype(np.float32)
        history = History(rng.integers(0, 30, 10).tolist())
        history.extend(rng.integers(0, 30, 10).tolist())
        expected = penalised(logits, history.tokens[:10], history.tokens[10:], params).argmax()
        assert sampler.choose(logits, history) == expected
        changed += expected != logits.argmax()
    assert changed > 10


def test_top_k_keeps_exactly_k_even_among_equals() -> None:
    probs = make_sampler(SamplingParams(temperature=1, top_k=3)).probs(np.zeros(1000, np.float32), History([0]))
    np.testing.assert_allclose(probs.probs, [1 / 3] * 3)


def test_top_p_of_a_flat_distribution_keeps_its_share() -> None:
    probs = make_sampler(SamplingParams(temperature=1, top_p=0.5)).probs(np.zeros(5000, np.float32), History([0]))
    assert len(probs.ids) == pytest.approx(2500, abs=1)


def test_masked_tokens_are_never_candidates() -> None:
    logits = np.array([1, -np.inf, 2, -np.inf], np.float32)
    for params in (SamplingParams(temperature=1), SamplingParams(temperature=1, top_k=3, top_p=0.99)):
        assert make_sampler(params).probs(logits, History([0])).ids.tolist() == [0, 2]


@pytest.mark.parametrize("temperature", [1e-300, 1e-30, 1e-6, 100.0])
def test_extreme_temperatures_stay_finite(temperature: float) -> None:
    logits = np.array([-40, 3, 40, 39.9], np.float32)
    probs = make_sampler(SamplingParams(temperature=temperature)).probs(logits, History([0]))
    assert np.isfinite(probs.probs).all()
    assert probs.ids[probs.probs.argmax()] == 2


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_numbers_are_an_error(bad: float, temperature: float) -> None:
    logits = np.zeros(1000, np.float32)
    logits[777] = bad
    sampler = make_sampler(SamplingParams(temperature=temperature))
    with pytest.raises(BackendError, match="not numbers"):
        (sampler.choose if sampler.greedy else sampler.probs)(logits, History([0]))


def test_a_row_of_nothing_but_minus_infinity_is_an_error() -> None:
    with pytest.raises(BackendError):
        make_sampler(SamplingParams()).choose(np.full(8, -np.inf, np.float32), History([0]))


def test_draw_follows_the_distribution() -> None:
    probs = SparseProbs(np.array([3, 5, 8, 9, 11]), np.array([0.5, 0.2, 0.15, 0.1, 0.05]))
    rng = np.random.default_rng(0)
    counts: Counter[tuple[int, ...]] = Counter((draw(probs, rng),) for _ in range(5000))
    assert_drawn_from(counts, {(int(i),): float(p) for i, p in zip(probs.ids, probs.probs, strict=True)})


def test_penalties_ignore_ids_that_the_row_lacks() -> None:
    """A draft's vocabulary may be narrower than the target's padded one."""
    history = History([9, 1])
    history.append(9)
    params = SamplingParams(repetition_penalty=2, presence_penalty=1, frequency_penalty=1)
    assert make_sampler(params).choose(np.array([1, 1.5, 0], np.float32), history) == 0


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -1},
        {"temperature": float("nan")},
        {"top_p": 0},
        {"top_p": 1.1},
        {"top_k": -1},
        {"min_p": 1},
        {"repetition_penalty": 0},
        {"seed": -1},
    ],
)
def test_options_out_of_range_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=next(iter(bad))):
        SamplingParams(**bad)  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", range(5))
def test_history_counts_what_it_holds(seed: int) -> None:
    rng = random.Random(seed)
    prompt = rng.choices(range(40), k=30)
    history = History(prompt)
    for _ in range(60):
        if rng.random() < 0.5:
            history.extend(rng.choices(range(600), k=rng.randrange(20)))
        elif rng.random() < 0.5:
            history.truncate(rng.randint(len(prompt), len(history)))
        else:
            history.follow([*history.tokens[: rng.randint(len(prompt), len(history))], *rng.choices(range(40), k=4)])
        generated = Counter(history.tokens[len(prompt) :])
        assert history.tokens[: len(prompt)] == prompt
        assert sorted(history.context_ids.tolist()) == sorted(set(history.tokens))
        counted = zip(history.generated_ids.tolist(), history.generated_counts.tolist(), strict=True)
        assert dict(counted) == dict(generated)
