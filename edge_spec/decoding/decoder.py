"""The one loop: draft, decode, verify, append. Plain decoding is this loop with a drafter that proposes nothing."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from time import perf_counter

import numpy as np

from edge_spec.decoding.drafter import Drafter, NoDrafter, Request
from edge_spec.decoding.history import History
from edge_spec.decoding.sampling import make_sampler
from edge_spec.decoding.session import Session
from edge_spec.decoding.supervisor import MEMORY_FAILURES, Interruptions, Supervisor, Unsupervised
from edge_spec.decoding.verify import verify
from edge_spec.errors import ContextLengthError, GenerationCancelled, UsageError
from edge_spec.types import Draft, DrafterStats, Eviction, FinishReason, Hole, ModelSpec, Progress, SamplingParams


@dataclass(frozen=True, slots=True)
class Step:
    """The tokens that one pass of the target yielded: the accepted drafts and the token after them.

    A stop id is the last of `tokens`; nothing follows it. `tokens` is empty only where the generation was cancelled, or
    stopped for want of memory.
    """

    tokens: list[int]
    source: str = "none"
    """Who drafted; "none" where nothing was drafted."""
    drafted: int = 0
    accepted: int = 0
    finish_reason: FinishReason | None = None
    """Set on the last step only."""


@dataclass(slots=True)
class DecodeStats:
    """One generation in figures; times in seconds."""

    steps: int = 0
    drafted: int = 0
    accepted: int = 0
    drafters: dict[str, DrafterStats] = field(default_factory=dict)
    """By source; "none" counts the steps without a draft."""
    prefill_s: float = 0.0
    """The first step as a whole: reading the prompt, by the draft model too."""
    draft_s: float = 0.0
    """Drafting, in the later steps."""
    draft_model_s: float = 0.0
    """Of that, the passes of the draft model; the rest is what drafters and planner cost themselves."""
    target_s: float = 0.0
    """The target's passes, in the later steps."""
    own_s: float = 0.0
    """All else in the later steps: verifying, sampling, bookkeeping."""
    holes: list[Hole] = field(default_factory=list)
    """What the context has lost so far, the prompt's losses first."""

    def add(self, step: Step) -> None:
        """Count one step."""
        self.steps += 1
        self.drafted += step.drafted
        self.accepted += step.accepted
        before = self.drafters.get(step.source, DrafterStats())
        self.drafters[step.source] = DrafterStats(
            before.steps + 1, before.drafted + step.drafted, before.accepted + step.accepted
        )

    def end_prefill(self) -> None:
        """What was spent so far was spent on the prompt."""
        self.prefill_s = self.draft_s + self.target_s + self.own_s
        self.draft_s = self.draft_model_s = self.target_s = self.own_s = 0.0


class SpeculativeDecoder:
    """Writes what the target of `session` would write alone, with fewer passes where `drafter` guesses well."""

    def __init__(self, session: Session, drafter: Drafter | None = None) -> None:
        self._session = session
        self._drafter = drafter or NoDrafter()
        self.stats = DecodeStats()
        """Figures of the latest generation; they grow while it runs."""
        self._eviction: Eviction | None = None
        self._history: History | None = None
        self._prune_to: int | None = None

    def generate(
        self,
        prompt_ids: Sequence[int],
        *,
        sampling: SamplingParams | None = None,
        max_tokens: int | None = None,
        stop_ids: Collection[int] = (),
        max_draft: int | None = None,
        references: Sequence[Sequence[int]] = (),
        archive: Sequence[int] = (),
        holes: Sequence[Hole] = (),
        eviction: Eviction | None = None,
        cancelled: Callable[[], bool] | None = None,
        on_progress: Progress | None = None,
        supervisor: Supervisor | None = None,
    ) -> Iterator[Step]:
        """Continue `prompt_ids`; yields every step as soon as it is decided.

        Ends at a stop id (STOP), after `max_tokens` (LENGTH; None: no limit), when prompt and new tokens fill n_ctx
        (CONTEXT_FULL), or when `cancelled()` turns true or `on_progress(read, to_read)`, called while the prompt is
        being read, returns False (CANCELLED; takes effect within one step, or one chunk of the prompt).
        `max_draft` caps the drafts of all drafters. `references`: texts, as ids, that a drafter may copy from;
        `archive`: what the context has lost, which may be copied from too. `supervisor` may step in between steps, and
        between the chunks of the prompt. Leaving the iterator early is fine.

        `holes`: what was evicted from the prompt while it was read. `eviction`: what goes when the window is full, so
        that the text goes on; the same goes at the same place whatever drafts.

        Raises at the call: UsageError, ContextLengthError (the prompt leaves no room for a token).
        """
        spec = self._session.spec
        if len(prompt_ids) == 0:
            raise UsageError("the prompt is empty; give it at least one token")
        if min(prompt_ids) < 0 or max(prompt_ids) >= spec.n_vocab:
            raise UsageError(f"the prompt has ids outside the vocabulary of {spec.n_vocab}")
        if max_tokens is not None and max_tokens < 1:
            raise UsageError(f"max_tokens={max_tokens} is out of range; it must be at least 1")
        if max_draft is not None and max_draft < 0:
            raise UsageError(f"max_draft={max_draft} is out of range; 0 drafts nothing")
        if len(prompt_ids) >= spec.n_ctx:
            raise ContextLengthError(len(prompt_ids), spec.n_ctx)

        sampling = sampling or SamplingParams()
        interruptions = Interruptions(cancelled or _never, on_progress, supervisor or Unsupervised())
        request = Request(
            sampling=sampling,
            rng=np.random.default_rng(sampling.seed),
            prompt_length=len(prompt_ids),
            max_length=_most_tokens(spec.n_ctx, len(prompt_ids), max_tokens, endless=_is_endless(eviction, spec.n_ctx)),
            n_vocab=spec.n_vocab,
            stop_ids=frozenset(stop_ids),
            references=tuple(tuple(text) for text in references),
            archive=tuple(archive),
            holes=tuple(holes),
            cancelled=interruptions.wanted,
        )
        limits = _Limits(
            spec=lambda: self._session.spec,
            max_length=sys.maxsize if max_tokens is None else len(prompt_ids) + max_tokens,
            max_draft=spec.max_rows - 1 if max_draft is None else min(max_draft, spec.max_rows - 1),
            stop_ids=request.stop_ids,
        )
        self.stats = DecodeStats(holes=list(holes))
        self._eviction, self._prune_to = eviction, None
        self._history = History(prompt_ids)
        return self._steps(self._history, request, limits, self.stats, interruptions)

    def prune(self, max_tokens: int) -> bool:
        """Before the next step, evict so that the context has at most `max_tokens` tokens; False if nothing may go.

        May be called between two steps, or from another thread.
        """
        if self._eviction is None:
            return False
        self._prune_to = max_tokens
        return True

    def prune_now(self, max_tokens: int) -> int:
        """Evict so that the context has at most `max_tokens` tokens, or as few as may be; returns how many went.

        For a supervisor that has stepped in: the cache is shorter when this returns. Nothing goes while the prompt is
        being read.
        """
        history = self._history
        if self._eviction is None or history is None or max_tokens >= len(history):
            return 0
        span = self._eviction.span_down_to(len(history), max_tokens)
        if span is None or self._session.count_unread(history.tokens, self.stats.holes) > 1:
            return 0
        self._evict(history, span)
        self._session.follow(history.tokens, self.stats.holes)
        return span[1] - span[0]

    def _steps(
        self,
        history: History,
        request: Request,
        limits: _Limits,
        stats: DecodeStats,
        interruptions: Interruptions,
    ) -> Iterator[Step]:
        sampler, lap, finish_reason = make_sampler(request.sampling), _Stopwatch(), None
        self._drafter.start(request)
        while finish_reason is None:
            lap()  # what passed since the last step was the caller's time
            try:
                self._make_room(history, limits)
                draft = self._propose(history, request, limits)
                stats.draft_s += lap()
                stats.draft_model_s += draft.model_s

                is_prompt = stats.steps == 0
                reading = interruptions.watch(is_prompt=is_prompt)
                sequence, num_rows = history.tokens + draft.tokens, len(draft.tokens) + 1
                unread = self._session.count_unread(sequence, stats.holes) if is_prompt else 0
                decoded = self._session.decode(sequence, rows=num_rows, holes=stats.holes, on_progress=reading)
                target_s = lap()
                stats.target_s += target_s

                verdict = verify(draft, decoded, sampler, request.rng, history)
            except (GenerationCancelled, *MEMORY_FAILURES) as interruption:
                finish_reason = interruptions.settle(interruption)
                if finish_reason is not None:
                    yield Step([], finish_reason=finish_reason)
                continue
            if is_prompt:
                self._drafter.observe_prompt(unread, target_s)
            self._drafter.observe(history.tokens, draft, verdict, None if is_prompt else target_s)
            tokens = limits.cut([*draft.tokens[: verdict.num_accepted], verdict.next_token])
            history.extend(tokens)
            finish_reason = limits.finish_reason(history, may_evict=self._may_evict(history, limits))
            accepted = min(verdict.num_accepted, len(tokens))
            step = Step(tokens, draft.source, len(draft.tokens), accepted, finish_reason)
            stats.add(step)
            stats.own_s += lap()
            if stats.steps == 1:
                stats.end_prefill()
            yield step

    def _make_room(self, history: History, limits: _Limits) -> None:
        """Evict what has to go before the next step."""
        wanted, self._prune_to = self._prune_to, None
        span = None
        if self._eviction is not None:
            if wanted is not None and wanted < len(history):
                span = self._eviction.span_down_to(len(history), wanted)
            elif len(history) >= limits.n_ctx:
                span = self._eviction.span(len(history), limits.n_ctx)
        if span is not None:
            self._evict(history, span)

    def _evict(self, history: History, span: tuple[int, int]) -> None:
        assert self._eviction is not None
        context = list(history.tokens)
        hole = history.evict(*span)
        self._eviction = self._eviction.after(*span)
        self._drafter.evict(context, hole)
        self.stats.holes.append(hole)

    def _may_evict(self, history: History, limits: _Limits) -> bool:
        return self._eviction is not None and self._eviction.span(len(history), limits.n_ctx) is not None

    def _propose(self, history: History, request: Request, limits: _Limits) -> Draft:
        if request.cancelled():
            raise GenerationCancelled("cancelled between two steps")
        room = limits.room_for_draft(history)
        draft = self._drafter.propose(history.tokens, room) if room > 0 else Draft([])
        assert len(draft.tokens) <= room, f"{draft.source} drafted more than the {room} tokens it was asked for"
        return draft if draft.tokens else Draft([], model_s=draft.model_s)


@dataclass(frozen=True, slots=True)
class _Limits:
    """Where a generation ends."""

    spec: Callable[[], ModelSpec]
    """The target's: its window may change while it writes."""
    max_length: int
    """Of prompt and new tokens, those that were evicted too."""
    max_draft: int
    stop_ids: frozenset[int]

    @property
    def n_ctx(self) -> int:
        return self.spec().n_ctx

    def room_for_draft(self, history: History) -> int:
        """How many tokens may be drafted, so that they and the token after them fit."""
        written = len(history) + history.num_evicted
        return max(0, min(self.max_draft, self.max_length - written - 1, self.n_ctx - len(history) - 1))

    def cut(self, tokens: list[int]) -> list[int]:
        """`tokens` up to and with the first stop id."""
        for i, token in enumerate(tokens):
            if token in self.stop_ids:
                return tokens[: i + 1]
        return tokens

    def finish_reason(self, history: History, *, may_evict: bool) -> FinishReason | None:
        if history.tokens[-1] in self.stop_ids:
            return FinishReason.STOP
        if len(history) + history.num_evicted >= self.max_length:
            return FinishReason.LENGTH
        if len(history) >= self.n_ctx and not may_evict:
            return FinishReason.CONTEXT_FULL
        return None


class _Stopwatch:
    """Called, returns the seconds since the last call."""

    def __init__(self) -> None:
        self._last = perf_counter()

    def __call__(self) -> float:
        last, self._last = self._last, perf_counter()
        return self._last - last


def _most_tokens(n_ctx: int, prompt: int, max_tokens: int | None, *, endless: bool) -> int:
    """What prompt and text may come to."""
    wanted = sys.maxsize if max_tokens is None else prompt + max_tokens
    return wanted if endless else min(n_ctx, wanted)


def _is_endless(eviction: Eviction | None, n_ctx: int) -> bool:
    """Whether a full window makes room for more."""
    return eviction is not None and eviction.span(n_ctx, n_ctx) is not None


def _never() -> bool:
    return False
