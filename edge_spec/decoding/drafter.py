"""What the loop asks of a drafter. The drafters themselves are in `edge_spec.drafting`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from edge_spec.types import Context, Draft, Hole, SamplingParams, Verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What a drafter may know about the generation that it drafts for."""

    sampling: SamplingParams
    rng: np.random.Generator
    """The generation's only source of randomness."""
    prompt_length: int
    max_length: int
    """Tokens that prompt and text may have together."""
    n_vocab: int
    """Ids from here on mean nothing to the target."""
    stop_ids: frozenset[int] = frozenset()
    """A draft ends after one of these: what would follow is never written."""
    references: tuple[tuple[int, ...], ...] = ()
    """Texts, as ids, that the answer may copy from."""
    archive: tuple[int, ...] = ()
    """Text, as ids, that was in the context and is no longer."""
    holes: tuple[Hole, ...] = ()
    """What was evicted from the prompt while it was read."""
    cancelled: Callable[[], bool] = lambda: False
    """For a drafter whose work takes long: it raises GenerationCancelled soon after this turns true."""

    @property
    def is_repeatable(self) -> bool:
        """Whether the same call has to give the same text again although it is sampled: nothing may go by a clock."""
        return self.sampling.temperature > 0 and self.sampling.seed is not None


class Drafter(Protocol):
    """Guesses the next tokens. Guesses cost or save time and never change what is written.

    Inherit from this and write `propose`; the rest has defaults that do nothing.
    """

    name: str

    def start(self, request: Request) -> None:  # noqa: ARG002 - a default that does nothing
        """Called once before each generation."""
        return

    def propose(self, context: Context, max_tokens: int) -> Draft:
        """Up to `max_tokens` (at least 1) tokens that may follow `context`, which must not be changed or kept.

        May return no tokens, which is plain decoding. What was sampled carries its distribution in `Draft.q`.
        """
        ...

    def observe_prompt(self, tokens_read: int, seconds: float) -> None:  # noqa: ARG002
        """Called when the target has read the prompt: so many tokens that it had not in its cache, in so long."""
        return

    def observe(self, context: Context, draft: Draft, verdict: Verdict, target_s: float | None) -> None:  # noqa: ARG002
        """Called with the fate of each draft and the context that it was made for.

        `target_s`: seconds of the target's pass; None for the first, which read the prompt too.
        """
        return

    def evict(self, context: Context, hole: Hole) -> None:  # noqa: ARG002
        """Called when `context` is about to lose the tokens of `hole`; the next one to draft for has not got them."""
        return

    def close(self) -> None:
        """Give the memory back. Closing twice is not an error."""
        return


class NoDrafter(Drafter):
    """Proposes nothing: plain decoding."""

    name = "none"

    def propose(self, context: Context, max_tokens: int) -> Draft:  # noqa: ARG002 - the protocol's signature
        """No tokens."""
        return Draft([])
