"""Recorded answers replayed through the real loop and the real planner, on a clock that passes cost their price.

What a draft would guess at each position of an answer is known, so a step needs no model: where the context has left
the answer (behind a wrong guess) the draft guesses wrong, as sure of itself as at some position drawn at random.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from unittest.mock import patch

import numpy as np

from draft_bench.answers import Answer
from edge_spec.backends.alignment import round_up
from edge_spec.backends.base import Parked
from edge_spec.decoding import Session, SpeculativeDecoder, decoder
from edge_spec.drafting import Costs, LookupDrafter, ModelDrafter, Planner, model
from edge_spec.errors import CacheUnsupportedError
from edge_spec.types import Decoded, ModelSpec, Output, TopK

Guesses = Sequence[tuple[int, float]]

_SECOND_ROW_MS, _ROW_MS = 1.0, 2.3
_NOISE, _MAX_ROWS = 0.05, 16
MAX_TOKENS = 128


@dataclass(frozen=True, slots=True)
class Passes:
    """What passes of a model cost: milliseconds by rows, tokens a second of reading, and what rows are padded to."""

    ms: Mapping[int, float]
    reads_per_s: float
    alignment: int = 1

    @classmethod
    def of_row_cost(cls, one_ms: float, row_cost: float) -> Passes:
        """Where nothing is padded, and each further row, and each token that is read, adds `row_cost` of a pass of one
        row, which takes `one_ms`."""
        ms = {n: one_ms * (1 + row_cost * (n - 1)) for n in range(1, _MAX_ROWS + 1)}
        return cls(ms, 1e3 / (one_ms * row_cost))

    @classmethod
    def of_draft(cls, one_ms: float) -> Passes:
        """Those of the default draft on onnx, if one of a row takes `one_ms`."""
        more = {n: _ROW_MS * (n - 1) for n in range(1, _MAX_ROWS + 1)} | {2: _SECOND_ROW_MS}
        return cls({n: one_ms + ms for n, ms in more.items()}, 450.0)

    def seconds(self, n: int) -> float:
        """Of a pass of `n` tokens."""
        return n / self.reads_per_s if n > _MAX_ROWS else self.ms[round_up(n, self.alignment)] / 1e3


TARGET = Passes(
    {1: 31.5, 2: 36.4, 4: 52.8, 6: 69.6, 8: 87.6, 10: 105.0, 12: 122.0, 14: 140.0, 16: 159.0}, 128.0, alignment=2
)
"""The default target on onnx, where rows are padded to even ones: docs/performance.md."""


class _Clock:
    def __init__(self) -> None:
        self.now = 0.0
        self._noise = np.random.default_rng(1)

    def __call__(self) -> float:
        return self.now

    def spend(self, seconds: float) -> None:
        self.now += seconds * float(np.exp(self._noise.normal(0, _NOISE)))


class _Recorded:
    """A `CausalLM` that knows one answer: the target's own, or what a draft guesses at its positions."""

    def __init__(self, n_vocab: int, clock: _Clock, passes: Passes) -> None:
        self.spec = ModelSpec(
            name="recorded",
            architecture="recorded",
            n_vocab=n_vocab,
            n_ctx=8192,
            n_ctx_train=8192,
            n_layer=1,
            n_kv_heads=1,
            head_dim=1,
            weight_bytes=1,
            kv_bytes_per_token=1,
            max_rows=_MAX_ROWS,
            row_alignment=passes.alignment,
        )
        self._clock, self._passes = clock, passes
        self._tokens: list[int] = []
        self._logits = np.zeros((_MAX_ROWS, n_vocab), np.float32)
        self._rng = np.random.default_rng(0)

    def play(self, answer: Answer, guesses: Guesses | None) -> None:
        self._text, self._start, self._guesses = answer.prompt + answer.ids, len(answer.prompt), guesses

    @property
    def length(self) -> int:
        return len(self._tokens)

    def rollback(self, length: int) -> None:
        del self._tokens[length:]

    def evict(self, start: int, end: int) -> None:  # noqa: ARG002
        raise CacheUnsupportedError("a recorded answer has no holes")

    def resize(self, n_ctx: int) -> None:  # noqa: ARG002
        raise CacheUnsupportedError("a recorded answer has no cache to resize")

    @property
    def park_bytes(self) -> int:
        return 0

    def park(self) -> Parked:
        raise CacheUnsupportedError("a recorded answer has no cache to set aside")

    def resume(self, parked: Parked) -> None:  # noqa: ARG002
        self.park()

    def swap(self, parked: Parked) -> Parked:  # noqa: ARG002
        return self.park()

    def close(self) -> None:
        return

    def decode(self, tokens: Sequence[int], *, rows: int = 1, want: Output = Output.LOGITS) -> Decoded:
        self._clock.spend(self._passes.seconds(len(tokens)))
        self._tokens += tokens
        length = len(self._tokens)
        said = [self._next(length - rows + row + 1) for row in range(rows)]
        if want is Output.LOGITS:
            self._logits[:rows] = 0
            self._logits[np.arange(rows), [token for token, _ in said]] = 30
            return Decoded(self._logits[:rows])
        ids, probs = np.array([[token] for token, _ in said]), np.array([[p] for _, p in said], np.float32)
        return Decoded(self._logits[:0], TopK(ids, np.log(probs), np.zeros(rows, np.float32)))

    def _next(self, position: int) -> tuple[int, float]:
        place = position - self._start
        on_text = 0 <= place < len(self._text) - self._start and self._tokens[:position] == self._text[:position]
        if self._guesses is None:
            return (self._text[position], 1.0) if on_text else (7, 1.0)
        if on_text:
            return self._guesses[place]
        return int(self._rng.integers(self.spec.n_vocab)), self._guesses[int(self._rng.integers(len(self._guesses)))][1]


def replay(
    answers: Sequence[Answer], guesses: Sequence[Guesses], draft_passes: Passes, target_passes: Passes = TARGET
) -> list[float]:
    """How many times faster than plain decoding the planner writes each answer.

    From their second token on; those of three tokens and less are left out. Plain passes have one row and are not
    padded. The planner does not learn beforehand how long an answer is: each may get `MAX_TOKENS`, and is left where it
    ends.
    """
    n_vocab = max(max(answer.prompt + answer.ids) for answer in answers)
    n_vocab = max(n_vocab, *(token for known in guesses for token, _ in known)) + 1
    clock = _Clock()
    target, draft = (_Recorded(n_vocab, clock, passes) for passes in (target_passes, draft_passes))
    session = Session(target)

    def costs() -> Costs:
        return Costs(max_rows=_MAX_ROWS, alignment=target_passes.alignment, draft_share=0.3)

    planner = Planner(costs(), LookupDrafter(max_draft=15, bold=True), ModelDrafter(Session(draft)), fixed=costs())
    ratios = []
    with patch.object(decoder, "perf_counter", clock), patch.object(model, "perf_counter", clock):
        for answer, known in zip(answers, guesses, strict=True):
            target.play(answer, None)
            draft.play(answer, known)
            counts: list[tuple[float, int]] = []
            max_tokens = max(MAX_TOKENS, len(answer.ids))
            for step in SpeculativeDecoder(session, planner).generate(answer.prompt, max_tokens=max_tokens):
                counts.append((clock.now, len(step.tokens)))
                if sum(tokens for _, tokens in counts) >= len(answer.ids):
                    break
            (first_at, first), last_at = counts[0], counts[-1][0]
            written = len(answer.ids) - first
            if written > 3:
                ratios.append(written * target_passes.ms[1] / 1e3 / (last_at - first_at))
    return ratios


def geometric_mean(ratios: Sequence[float]) -> float:
    """Of ratios, the mean that is the same whichever way round they are taken."""
    return float(np.exp(np.mean(np.log(ratios))))
