"""Attention sinks and a recent window (StreamingLLM, arXiv 2309.17453): the middle is evicted from the cache.

What is left is not read again: the tokens behind the gap move down in the cache, and go on from what they once saw.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from edge_spec.context.keeper import Answered, Asking
from edge_spec.context.transcript import Message, Transcript
from edge_spec.errors import ContextLengthError, UsageError
from edge_spec.types import Dropped, Hole, Prompt

_ARCHIVE_TOKENS = 8192
MIN_SINKS = 4
"""Tokens at the start that attention leans on, whatever they say (the paper's number)."""


MIN_WINDOW = 16
"""Smaller ones have no middle to lose."""


@dataclass(frozen=True, slots=True)
class Sinks:
    """Keeps the first `sinks` tokens and the latest ones; implements `Eviction`.

    Sinks take a quarter of the window at most.
    """

    sinks: int = MIN_SINKS
    low: float = 0.75
    """Share of the window that is left each time."""
    policy = "sinks"

    def span(self, length: int, n_ctx: int) -> tuple[int, int] | None:
        """See `Eviction`."""
        return self.span_down_to(length, max(2, int(self.low * n_ctx)))

    def span_down_to(self, length: int, max_tokens: int) -> tuple[int, int] | None:
        """See `Eviction`. At least one recent token stays."""
        start = min(self.sinks, max_tokens // 4)
        end = min(length - max_tokens + start, length - 1)
        return (start, end) if end > start else None

    def after(self, start: int, end: int) -> Sinks:  # noqa: ARG002 - what stays is told by lengths alone
        """See `Eviction`."""
        return self


@dataclass(frozen=True, slots=True)
class Stretch:
    """A context that was read up to its end, and what it has lost on the way."""

    ids: list[int]
    holes: tuple[Hole, ...] = ()

    def without(self, span: tuple[int, int]) -> Stretch:
        """The context when all of it has been read and the tokens of `span` go."""
        start, end = span
        left = [*self.ids[:start], *self.ids[end:]]
        return Stretch(left, (*self.holes, Hole(start, tuple(self.ids[start:end]), len(left))))


def read_on(before: Stretch, new: Sequence[int], n_ctx: int, policy: Sinks) -> Stretch:
    """The context when `new` (at least one token) has been read after `before`, with less than `n_ctx` tokens.

    Where the window fills up, the context loses tokens before the next are read; a text longer than the window
    streams through it. Raises ContextLengthError for a window that is too small for that.
    """
    if n_ctx < MIN_WINDOW:
        raise ContextLengthError(len(before.ids) + len(new), n_ctx)
    context, rest = before, list(new)
    goal = max(2, int(policy.low * n_ctx))
    while len(context.ids) + len(rest) >= n_ctx:
        # Room for all that is to come, or where that is much, for a good part of it.
        span = policy.span_down_to(len(context.ids), max(goal - len(rest), goal // 2))
        if span is not None:
            context = context.without(span)
        if len(context.ids) + len(rest) >= n_ctx:
            take = min(len(rest) - 1, n_ctx - len(context.ids))
            context, rest = Stretch([*context.ids, *rest[:take]], context.holes), rest[take:]
    return Stretch([*context.ids, *rest], context.holes)


def report(holes: Sequence[Hole], decode: Callable[[Sequence[int]], str], policy: str) -> tuple[Dropped, ...]:
    """What a context has lost by a policy, for a result."""
    if not holes:
        return ()
    return (Dropped(policy, sum(len(hole.tokens) for hole in holes), "\n".join(decode(h.tokens) for h in holes)),)


class SinkKeeper:
    """Keeps a conversation as one sequence that loses its middle. The system message is among the sinks."""

    def __init__(self, transcript: Transcript) -> None:
        """Raises UsageError for a template that changes what was read."""
        if not transcript.appends():
            raise UsageError("this model's chat template rewrites earlier turns, which sinks cannot follow: use turns")
        self._transcript = transcript
        self._policy = Sinks(max(MIN_SINKS, transcript.opening_length()))
        self._context: Stretch | None = None
        self._last: list[Message] = []

    def reset(self) -> None:
        """Forget every turn."""
        self._context, self._last = None, []

    def ask(self, question: str, *, n_ctx: int, max_tokens: int | None) -> Asking:  # noqa: ARG002 - the protocol's
        """The question behind what is left of the conversation."""
        message = {"role": "user", "content": question}
        before, new = self._context or Stretch([]), self._transcript.ids_after(self._last, message)
        if before.ids and self._transcript.ends_itself(new, before.ids[-1]):
            before = Stretch(before.ids[:-1], before.holes)
        context = read_on(before, new, n_ctx, self._policy)

        def settle(answered: Answered | None) -> None:
            if answered is None:
                return
            ids, holes = [*context.ids, *answered.ids], tuple(answered.holes)
            for hole in holes[len(context.holes) :]:
                del ids[hole.start : hole.end]
            self._context = Stretch(ids, holes)
            self._last = [message, {"role": "assistant", "content": answered.text}]

        archive = tuple(token for hole in context.holes for token in hole.tokens)[-_ARCHIVE_TOKENS:]
        return Asking(Prompt(context.ids, context.holes, self._policy, archive), settle)

    def prune(self, max_tokens: int) -> int:
        """Evict what is neither a sink nor recent."""
        if self._context is None:
            return 0
        span = self._policy.span_down_to(len(self._context.ids), max_tokens)
        if span is None:
            return 0
        self._context = self._context.without(span)
        return span[1] - span[0]
