"""The sampling rules once more, dense, in float64 and as plainly as they can be written; and a statistical test."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from edge_spec.types import SamplingParams
from tests.fakes import FakeLM


def penalised(
    logits: NDArray[np.float32], prompt: Sequence[int], generated: Sequence[int], params: SamplingParams
) -> NDArray[np.float64]:
    out = logits.astype(np.float64)
    for token in {*prompt, *generated}:
        factor = params.repetition_penalty
        out[token] = out[token] / factor if out[token] > 0 else out[token] * factor
    for token, count in Counter(generated).items():
        out[token] -= params.presence_penalty + params.frequency_penalty * count
    return out


def distribution(
    logits: NDArray[np.float32], prompt: Sequence[int], generated: Sequence[int], params: SamplingParams
) -> NDArray[np.float64]:
    """Probabilities of all tokens, shape [n_vocab]: penalties, temperature, top-k, top-p, min-p, in this order."""
    scores = penalised(logits, prompt, generated, params) / params.temperature
    order = np.argsort(-scores, kind="stable")
    keep = np.ones(len(scores), dtype=bool)
    if params.top_k:
        keep[order[params.top_k :]] = False
    probs = _normalised(scores, keep)
    mass = 0.0
    for token in order:
        if mass >= params.top_p:
            keep[token] = False
        mass += probs[token]
    probs = _normalised(scores, keep)
    return _normalised(scores, keep & (probs >= params.min_p * probs.max()))


def _normalised(scores: NDArray[np.float64], keep: NDArray[np.bool_]) -> NDArray[np.float64]:
    weights = np.where(keep, np.exp(scores - scores.max()), 0.0)
    return np.asarray(weights / weights.sum())


def greedy_text(
    model: FakeLM, prompt: Sequence[int], max_tokens: int, params: SamplingParams, stop_ids: Sequence[int] = ()
) -> list[int]:
    """What `model` writes by itself, with no cache, no session and no loop of ours."""
    generated: list[int] = []
    while len(generated) < max_tokens and len(prompt) + len(generated) < model.spec.n_ctx:
        logits = model.logits_after([*prompt, *generated])
        generated.append(int(penalised(logits, prompt, generated, params).argmax()))
        if generated[-1] in stop_ids:
            break
    return generated


def text_distribution(
    model: FakeLM, prompt: Sequence[int], length: int, params: SamplingParams
) -> dict[tuple[int, ...], float]:
    """The exact probability of every text of `length` tokens that can follow `prompt`."""
    texts: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(length):
        longer: dict[tuple[int, ...], float] = {}
        for text, so_far in texts.items():
            probs = distribution(model.logits_after([*prompt, *text]), prompt, text, params)
            longer |= {(*text, int(token)): so_far * float(probs[token]) for token in np.flatnonzero(probs)}
        texts = longer
    return texts


Z_ONE_IN_A_MILLION = 4.753
"""A standard normal exceeds this with probability 1e-6."""


def assert_drawn_from(counts: Mapping[tuple[int, ...], int], expected: Mapping[tuple[int, ...], float]) -> None:
    """Pearson's chi-square test. A right sampler fails about once in a million tries (and never again with its seed).

    The rarest outcomes are pooled until 5 are expected; the quantile is Wilson and Hilferty's approximation.
    """
    assert set(counts) <= set(expected), "something impossible was drawn"
    total = sum(counts.values())
    cells: list[tuple[int, float]] = []
    seen, due = 0, 0.0
    for text, p in sorted(expected.items(), key=lambda item: item[1]):
        seen, due = seen + counts.get(text, 0), due + total * p
        if due >= 5:
            cells.append((seen, due))
            seen, due = 0, 0.0
    statistic = sum((seen - due) ** 2 / due for seen, due in cells)
    freedom = len(cells) - 1
    assert freedom >= 1, "too few cells to say anything"
    limit = freedom * (1 - 2 / (9 * freedom) + Z_ONE_IN_A_MILLION * math.sqrt(2 / (9 * freedom))) ** 3
    assert statistic < limit, f"chi-square {statistic:.1f} over {limit:.1f} ({freedom} degrees of freedom)"
