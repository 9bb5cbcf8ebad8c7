"""How long the passes of a loaded model take, by how many tokens they hold."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from time import perf_counter

import numpy as np

from edge_spec.backends.base import CausalLM
from edge_spec.types import Output

_CHUNK = 256
"""Tokens of one pass where many are read."""


@dataclass(frozen=True, slots=True)
class PassTime:
    """A pass over `rows` tokens, all scored as far as the model allows, behind `cached` tokens: its median time."""

    cached: int
    rows: int
    seconds: float


def fill(model: CausalLM, length: int, clock: Callable[[], float] = perf_counter) -> float:
    """Read arbitrary tokens until `length` are cached; returns how many it read a second, 0 for none."""
    count = length - model.length
    started = clock()
    while model.length < length:
        model.decode(_tokens(model, min(_CHUNK, length - model.length)), rows=0)
    spent_s = clock() - started
    return count / spent_s if spent_s > 0 else 0.0


def time_passes(
    model: CausalLM,
    rows: Sequence[int],
    *,
    repeats: int,
    budget_s: float = float("inf"),
    want: Output = Output.LOGITS,
    clock: Callable[[], float] = perf_counter,
) -> list[PassTime]:
    """Times of passes of each of `rows` behind what is cached, in turn, so that a slow moment hits all of them alike.

    At least one round, no further pass after `budget_s` seconds. Leaves the cache as it was.
    """
    cached, started = model.length, clock()
    times: dict[int, list[float]] = {n: [] for n in rows}
    for n in rows[:1]:  # the first pass after another kind of work is not like the others
        _time(model, n, want, clock)
    for n in list(rows) * repeats:
        if times[n] and clock() - started > budget_s:
            break
        times[n].append(_time(model, n, want, clock))
    assert model.length == cached
    return [PassTime(cached, n, median(seconds)) for n, seconds in times.items()]


def _time(model: CausalLM, n: int, want: Output, clock: Callable[[], float]) -> float:
    cached, tokens = model.length, _tokens(model, n)
    started = clock()
    model.decode(tokens, rows=min(n, model.spec.max_rows), want=want)
    seconds = clock() - started
    model.rollback(cached)
    return seconds


def _tokens(model: CausalLM, n: int) -> list[int]:
    """Tokens of no meaning: what they are does not change what they cost."""
    generator = np.random.default_rng(model.length)
    return [int(token) for token in generator.integers(0, model.spec.n_vocab, n)]
