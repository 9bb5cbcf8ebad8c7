"""What a draft token costs, and how often it is what the target writes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import perf_counter

import numpy as np

from draft_bench.answers import Answer
from edge_spec.backends.onnx import OnnxModel
from edge_spec.decoding import Session
from edge_spec.decoding.session import PREFILL_CHUNK
from edge_spec.drafting import ModelDrafter, Request
from edge_spec.types import TOP_K, Output, SamplingParams

DRAFTED, CACHED = 4, 256
"""Tokens that are timed at a time, behind so many."""

_ROWS = 16


class _Always:
    """A pace that asks for confidence, as the planner does, and stops nowhere."""

    def worth_drafting(self, confidence: Sequence[float]) -> bool:  # noqa: ARG002
        return True

    def worth_verifying(self, confidence: Sequence[float]) -> bool:  # noqa: ARG002
        return True


def drafting(model: OnnxModel, context: list[int]) -> Callable[[], None]:
    """Drafts behind `context` as generations do: the likeliest token of the reduced output, and its probability."""
    drafter = ModelDrafter(Session(model))
    drafter.start(
        Request(
            sampling=SamplingParams(),
            rng=np.random.default_rng(0),
            prompt_length=len(context),
            max_length=len(context) + DRAFTED,
            n_vocab=model.spec.n_vocab,
        )
    )
    drafter.pace = _Always()

    def draft() -> None:
        drafter.propose(context, DRAFTED)

    return draft


def straightforward(model: OnnxModel, context: list[int]) -> Callable[[], None]:
    """Drafts behind `context` from whole rows of logits: their largest entry, and a softmax for its probability."""
    session = Session(model)

    def draft() -> None:
        tokens = list(context)
        for _ in range(DRAFTED):
            row = session.decode(tokens).logits[0]
            best = int(row.argmax())
            float(1 / np.exp(row - row[best]).sum())
            tokens.append(best)

    return draft


def time_in_turn(ways: Sequence[Callable[[], None]], rounds: int) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    """Milliseconds of a draft token, [rounds, ways]: all ways in turn each round, in alternating order."""
    taken = np.zeros((rounds, len(ways)))
    for way in ways:
        way()
    for number in range(rounds):
        order = range(len(ways)) if number % 2 else reversed(range(len(ways)))
        for i in order:
            ways[i]()  # what the way before left in the caches is no part of it
            started = perf_counter()
            ways[i]()
            taken[number, i] = (perf_counter() - started) / DRAFTED * 1e3
    return taken


def guess(model: OnnxModel, answer: Answer) -> list[tuple[int, float]]:
    """The draft's likeliest token, and its probability, at each position of the target's answer.

    The model reads the target's tokens, never its own. What the prompt and the answer so far hold is reachable, as it
    is to a drafter; inside a pass of 16 rows that is what came before the pass.
    """
    sequence, start = answer.prompt + answer.ids, len(answer.prompt) - 1
    model.rollback(0)
    for first in range(0, start, PREFILL_CHUNK):
        model.decode(sequence[first : min(first + PREFILL_CHUNK, start)], rows=0)
    guesses = []
    for first in range(start, len(sequence) - 1, _ROWS):
        model.reach(sequence[: first + 1], anew=first == start)
        part = sequence[first : min(first + _ROWS, len(sequence) - 1)]
        top = model.decode(part, rows=len(part), want=Output.TOP_K).top
        assert top is not None
        assert top.ids.shape[1] <= TOP_K
        guesses += list(zip(top.ids[:, 0].tolist(), np.exp(top.logits[:, 0] - top.log_sum).tolist(), strict=True))
    return guesses
