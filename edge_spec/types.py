"""Values that cross module borders. Nothing here imports the rest of the package."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, StrEnum
from typing import Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

Logits: TypeAlias = NDArray[np.float32]
"""Float32 scores, one a vocabulary entry in the last axis."""

Context: TypeAlias = Sequence[int]
"""The whole sequence that a model has to have read: absolute, never a delta."""

Progress: TypeAlias = Callable[[int, int], bool | None]
"""Called as `progress(done, total)`; returning False asks to stop."""


@dataclass(frozen=True, slots=True)
class Hole:
    """Tokens that were evicted from a context. Lengths count the tokens that were left right then.

    They stood at `start`; `read` tokens of what was left had been read when they went, and those from `start` on saw
    them. So two contexts are the same only if their tokens and their holes are.
    """

    start: int
    tokens: tuple[int, ...]
    read: int

    @property
    def end(self) -> int:
        """Where they ended."""
        return self.start + len(self.tokens)


class Eviction(Protocol):
    """Says what a context loses while it is written on."""

    @property
    def policy(self) -> str:
        """The policy's name, as in `Dropped`."""
        ...

    def span(self, length: int, n_ctx: int) -> tuple[int, int] | None:
        """Start and end of the tokens that go when `length` of `n_ctx` are there; None where nothing may go."""
        ...

    def span_down_to(self, length: int, max_tokens: int) -> tuple[int, int] | None:
        """The same, so that at most `max_tokens` are left, or as few as may be."""
        ...

    def after(self, start: int, end: int) -> Eviction:
        """What may go next, now that the tokens [start, end) have gone."""
        ...


class FinishReason(StrEnum):
    """Why a generation ended."""

    STOP = "stop"
    """The model ended its turn."""
    STOP_STRING = "stop_string"
    """One of the caller's stop strings appeared; it is not part of the text."""
    LENGTH = "length"
    """`max_tokens` were written."""
    CONTEXT_FULL = "context_full"
    """The window of n_ctx tokens is full."""
    CANCELLED = "cancelled"
    """The caller stopped."""
    MEMORY = "memory"
    """Memory ran short, and there was nothing left to give back; the text is what was written until then."""


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """What a loaded model is and can do; sizes in bytes, lengths in tokens."""

    name: str
    architecture: str
    n_vocab: int
    """Width of a row of logits (padded tails included)."""
    n_ctx: int
    """Length of the cache that was allocated."""
    n_ctx_train: int
    """Longest context that the model was trained for."""
    n_layer: int
    n_kv_heads: int
    head_dim: int
    weight_bytes: int
    kv_bytes_per_token: int
    max_rows: int
    """Most positions that one decode can return logits for."""
    row_alignment: int | None
    """Decodes are padded to a multiple of this many rows, so that a row's logits do not depend on what else was in
    the pass (1: none needed). None: no such promise; a row may differ in its last bits from pass to pass."""
    kv_type: str = "f32"
    """What keys and values are stored as: `f32`, `f16`, or a quantised type by its library's name."""
    can_evict: bool = False
    """Whether tokens can be dropped from the middle of the cache."""
    can_resize: bool = False
    """Whether the cache can be made anew in another length with its tokens kept."""
    can_park: bool = False
    """Whether a cached sequence can be set aside for another one, and taken up again to the bit."""
    can_roll_back: bool = True
    """Whether the cache can be shortened to other lengths than 0."""


TOP_K = 64
"""Tokens in a row of `Output.TOP_K`: drafts are sampled from no more, and the tail is seldom accepted."""


class Output(Enum):
    """What a decode returns for the positions that it was asked for."""

    LOGITS = "logits"
    """A score for every entry of the vocabulary."""
    TOP_K = "top_k"
    """The likeliest tokens and the mass of all: what drafting needs, without a row as long as the vocabulary."""


@dataclass(frozen=True, slots=True)
class TopK:
    """The `TOP_K` likeliest tokens of each position, or as many as there are, the likeliest first.

    The probability of a token is `exp(logits - log_sum)`, of all tokens that the model scores: where its head is
    trimmed, those that the head keeps or that were made reachable.
    """

    ids: NDArray[np.int64]
    """[rows, k], of the vocabulary whatever the head keeps."""
    logits: Logits
    """[rows, k], falling."""
    log_sum: Logits
    """[rows]: the logarithm of the sum of exp over all scored logits."""


@dataclass(frozen=True, slots=True)
class Decoded:
    """What a decode returns of its last `rows` positions; views, valid until the next decode."""

    logits: Logits
    """[rows, n_vocab]; [0, n_vocab] where `Output.TOP_K` was wanted."""
    top: TopK | None = None
    """Set where `Output.TOP_K` was wanted."""


@dataclass(frozen=True, slots=True)
class SparseProbs:
    """A distribution over the vocabulary that is zero outside `ids`.

    `ids`: int64 [k], distinct; `probs`: float64 [k], positive, sum 1.
    """

    ids: NDArray[np.int64]
    probs: NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Draft:
    """A chain of proposed tokens. `q[i]` is the distribution that `tokens[i]` was really sampled from.

    `q` None means that the tokens were not sampled (each q is one-hot): lookups, and a greedy draft model.
    `confidence[i]`, where it is given, is what the drafter thinks of `tokens[i]`, on a scale of its own.
    """

    tokens: list[int]
    q: list[SparseProbs] | None = None
    source: str = "none"
    confidence: Sequence[float] = field(default=(), compare=False)
    model_s: float = field(default=0.0, compare=False)
    """Seconds that a draft model's passes took for it."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the target made of a draft: the first `num_accepted` tokens stand, then comes `next_token`.

    `next_token` is the recovered token where the draft was cut short, else the bonus token.
    """

    num_accepted: int
    next_token: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the next token is chosen. Steps apply in the order of the fields; the defaults of each step do nothing.

    `temperature` 0 is greedy: the most likely token after the penalties.
    """

    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens in the context (CTRL, arXiv 1909.05858)."""
    presence_penalty: float = 0.0
    """Subtracted once from the logit of each token that was generated."""
    frequency_penalty: float = 0.0
    """Subtracted from a token's logit for each time that it was generated."""
    temperature: float = 0.0
    top_k: int = 0
    """Keep the k most likely tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of most likely tokens whose mass reaches p (arXiv 1904.09751)."""
    min_p: float = 0.0
    """Drop tokens less likely than min_p times the most likely one (arXiv 2407.01082)."""
    seed: int | None = None
    """Seeds the generator; None draws a fresh seed."""

    def __post_init__(self) -> None:
        from edge_spec.errors import UsageError

        checks = {
            "repetition_penalty": self.repetition_penalty > 0,
            "presence_penalty": -100 <= self.presence_penalty <= 100,
            "frequency_penalty": -100 <= self.frequency_penalty <= 100,
            "temperature": 0 <= self.temperature <= 100,
            "top_k": self.top_k >= 0,
            "top_p": 0 < self.top_p <= 1,
            "min_p": 0 <= self.min_p < 1,
            "seed": self.seed is None or self.seed >= 0,
        }
        for name, ok in checks.items():
            if not ok:
                raise UsageError(f"{name}={getattr(self, name)!r} is out of range")


@dataclass(frozen=True, slots=True)
class Dropped:
    """What the model had not before it any more when it answered."""

    policy: str
    """"turns", "sinks" or "surprisal"."""
    tokens: int
    text: str
    """What it said; passages that did not follow each other stand on lines of their own."""


@dataclass(frozen=True, slots=True)
class Condensing:
    """What became of a text before it was made a prompt."""

    dropped: Dropped
    archive: tuple[int, ...]
    """The text as it was, as ids."""
    seconds: float
    """What that took; a part of the time to the first token."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """The ids that are read before the first token is written, and what became of those that are not among them."""

    ids: list[int]
    holes: tuple[Hole, ...] = ()
    """What was evicted while they were read."""
    eviction: Eviction | None = None
    """What goes when the window is full; None ends the text then."""
    archive: tuple[int, ...] = ()
    """Text that was dropped, as ids: still good to copy from."""
    dropped: tuple[Dropped, ...] = ()
    notes: tuple[str, ...] = ()
    """What the user should know of it."""
    condensing: Condensing | None = None
    """How the newest message was condensed; None where it is as it was given."""

    @property
    def all_archive(self) -> tuple[int, ...]:
        """All that may be copied from though it is not read."""
        return (*self.archive, *(self.condensing.archive if self.condensing else ()))


@dataclass(frozen=True, slots=True)
class DrafterStats:
    """What one drafter did in a generation."""

    steps: int = 0
    drafted: int = 0
    accepted: int = 0


@dataclass(frozen=True, slots=True)
class Piece:
    """Text that can be shown now (whole characters), with the ids that were decoded for it (may be several or none)."""

    text: str
    token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationResult:
    """One finished generation. Times in seconds, sizes in bytes; `ttft_s` leaves out loading, which is `load_s`."""

    text: str
    token_ids: list[int]
    prompt_tokens: int
    generated_tokens: int
    finish_reason: FinishReason
    load_s: float
    ttft_s: float
    decode_tokens_per_s: float
    total_s: float
    steps: int
    drafted: int
    accepted: int
    acceptance_rate: float
    tokens_per_step: float
    drafters: Mapping[str, DrafterStats]
    target: str
    draft: str | None
    backend: str
    recipe: str
    threads: int
    n_ctx: int
    peak_rss_bytes: int
    notes: list[str] = field(default_factory=list)
    draft_backend: str | None = None
    """Where the draft ran, None without one; `backend` is the target's."""
    dropped: tuple[Dropped, ...] = ()
    """What the context has lost; `prompt_tokens` counts what was left."""
    measures: tuple[str, ...] = ()
    """What was given up in the middle of this generation because memory was short, in order; `notes` say why."""
