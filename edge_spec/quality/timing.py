"""What a pass costs, two models in turn, so that a machine that slows down slows both."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

import numpy as np

from edge_spec.quality.contender import Contender

CACHED_TOKENS = 256
"""Tokens that the cache holds when a pass is timed."""

WIDTHS = (1, 4, 8)
"""Tokens of the passes."""


def time_passes(
    contenders: Sequence[Contender], *, repeats: int = 15, widths: Sequence[int] = WIDTHS
) -> list[dict[int, float]]:
    """Median milliseconds of a pass over `widths` new tokens, with logits for each, of every contender in turn."""
    rng = np.random.default_rng(0)
    n_vocab = min(contender.tokenizer.n_vocab for contender in contenders)
    for contender in contenders:
        contender.session.forget()
        contender.model.rollback(0)
        contender.model.decode(rng.integers(0, n_vocab, CACHED_TOKENS).tolist(), rows=0)
    taken: list[dict[int, list[float]]] = [{n: [] for n in widths} for _ in contenders]
    for _ in range(repeats):
        for contender, times in zip(contenders, taken, strict=True):
            for n in widths:
                tokens = rng.integers(0, n_vocab, n).tolist()
                # The first pass of this width brings its weights and buffers back into the caches.
                for timed in (False, True):
                    started = time.perf_counter()
                    contender.model.decode(tokens, rows=n)
                    if timed:
                        times[n].append((time.perf_counter() - started) * 1e3)
                    contender.model.rollback(CACHED_TOKENS)
    return [{n: statistics.median(times[n]) for n in widths} for times in taken]
