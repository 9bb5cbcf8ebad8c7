"""The likeliest tokens by short cuts equal those by sorting, and sampling from them equals sampling from all."""

from __future__ import annotations

import numpy as np
import pytest

from edge_spec.backends.top_k import top_k
from edge_spec.decoding.history import History
from edge_spec.decoding.sampling import make_sampler
from edge_spec.errors import BackendError
from edge_spec.types import SamplingParams
from tests.reference import distribution


def random_logits(*shape: int, seed: int = 0) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    return (3 * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


@pytest.mark.parametrize("n", [1, 5, 64, 65, 4000, 5000, 40_000])
@pytest.mark.parametrize("k", [1, 7, 64])
def test_the_top_k_are_those_of_a_sort(n: int, k: int) -> None:
    logits = random_logits(3, n)
    top = top_k(logits, k)
    expected = np.argsort(-logits, axis=1)[:, :k]
    assert np.array_equal(top.ids, expected)
    assert np.array_equal(top.logits, np.take_along_axis(logits, expected, axis=1))
    np.testing.assert_allclose(top.log_sum, np.log(np.exp(logits.astype(np.float64)).sum(axis=1)), rtol=1e-5)


def test_of_equal_logits_the_first_come_first() -> None:
    assert top_k(np.ones((1, 10), np.float32), 10).ids.tolist() == [list(range(10))]


def test_no_rows_have_no_top_k() -> None:
    assert top_k(np.empty((0, 100), np.float32)).ids.shape == (0, 64)


def test_large_logits_do_not_overflow() -> None:
    top = top_k(np.array([[1e30, 1, -1e30]], np.float32))
    assert np.isfinite(top.log_sum).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("n", [3, 10_000])
def test_logits_that_are_not_numbers_are_an_error(bad: float, n: int) -> None:
    logits = random_logits(2, n)
    logits[1, n // 2] = bad
    with pytest.raises(BackendError, match="not numbers"):
        top_k(logits)
    with pytest.raises(BackendError, match="not numbers"):
        top_k(np.full((1, n), -np.inf, np.float32))


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0.7),
        SamplingParams(temperature=1.3, repetition_penalty=1.4, frequency_penalty=0.3, presence_penalty=0.2),
        SamplingParams(temperature=1, top_p=0.8, min_p=0.02),
        SamplingParams(temperature=1, top_k=5, repetition_penalty=0.8),
    ],
)
def test_sampling_from_all_tokens_in_another_order_changes_nothing(params: SamplingParams) -> None:
    logits, prompt, generated = random_logits(1, 50), [3, 4, 4, 49], [4, 7, 7, 7]
    history, sampler = History(prompt), make_sampler(params)
    history.extend(generated)
    top = top_k(logits)
    dense, sparse = sampler.probs(logits[0], history), sampler.probs(top.logits[0], history, top.ids[0])
    assert np.array_equal(dense.ids, sparse.ids)
    np.testing.assert_allclose(dense.probs, sparse.probs, rtol=1e-6)
    np.testing.assert_allclose(distribution(logits[0], prompt, generated, params)[sparse.ids], sparse.probs, rtol=1e-4)
    assert sampler.choose(logits[0], history) == sampler.choose(top.logits[0], history, top.ids[0])


def test_penalties_of_tokens_outside_the_top_k_touch_nothing() -> None:
    logits = random_logits(1, 500)
    top = top_k(logits, 4)
    outside = [token for token in range(500) if token not in top.ids]
    sampler = make_sampler(SamplingParams(temperature=1, repetition_penalty=2, presence_penalty=1))
    history = History(outside)
    history.extend(outside)
    probs = sampler.probs(top.logits[0], history, top.ids[0])
    weights = np.exp(top.logits[0].astype(np.float64) - top.logits[0, 0])
    expected = dict(zip(top.ids[0].tolist(), (weights / weights.sum()).tolist(), strict=True))
    assert dict(zip(probs.ids.tolist(), probs.probs.tolist(), strict=True)) == pytest.approx(expected, rel=1e-5)
