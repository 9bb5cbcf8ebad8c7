"""One generation as text: tokens become whole characters, stop strings cut, figures are kept."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import TypedDict

from edge_spec.decoding.decoder import DecodeStats, SpeculativeDecoder, Step
from edge_spec.decoding.stop import StopStrings
from edge_spec.errors import UsageError
from edge_spec.tokenizer import Detokenizer
from edge_spec.types import Dropped, FinishReason, GenerationResult, Piece, Progress, Prompt, SamplingParams

# Here and not where it is used: a stream may end while Python shuts down, when nothing can be imported any more.
if sys.platform != "win32":
    import resource


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What was loaded. `recipe` says how the target's weights are stored, `notes` what the user should know."""

    target: str
    draft: str | None
    backend: str
    recipe: str
    threads: int
    n_ctx: int
    load_s: float
    notes: list[str]
    chat_sampling: SamplingParams
    chat_system: str | None
    draft_backend: str | None = None
    """Where the draft runs; None without one."""
    budget_bytes: int | None = None
    """Most anonymous memory that the process may hold."""
    planned_bytes: int | None = None
    """Most that it is expected to; None where that cannot be told beforehand."""
    given_up: tuple[str, ...] = ()
    """What was given up to stay within the budget."""
    kv: str = "f32"
    """What the target's keys and values are stored as."""


class GenerationOptions(TypedDict, total=False):
    """What a generation may be told, whichever way it is started."""

    max_tokens: int | None
    """Most tokens to write; None: until the turn ends or the window is full."""
    sampling: SamplingParams | None
    """How tokens are chosen; None is greedy."""
    stop: Sequence[str]
    """Texts that end the answer; they are not part of it."""
    drafter: str | None
    """What drafts this time; None is what the engine was loaded with."""
    reference: Sequence[str]
    """Texts that the answer is likely to copy from; they change its speed only."""
    on_progress: Progress | None
    """Called with `(read, to_read)` while the prompt is read; False cancels."""


Finish = Callable[["Stream"], GenerationResult]


class Stream:
    """A generation that runs while it is iterated over; yields a `Piece` for each step that gives text.

    `cancel()` may be called from another thread or a signal handler and takes effect within one step. `result` is
    there once the iteration has ended. A loop that was left early can be gone on with, or ended by `close()`.
    """

    def __init__(
        self,
        steps: Callable[[Callable[[], bool]], Iterator[Step]],
        decoder: SpeculativeDecoder,
        detokenizer: Detokenizer,
        stop: Sequence[str],
        finish: Finish,
    ) -> None:
        self._stop_strings = StopStrings(stop)
        # Not a threading.Event: its lock would hang a signal handler that interrupts another one's `cancel`.
        self._cancelled = False
        # At once, so that what is wrong with the arguments is raised at the call and not in the loop.
        self._steps = steps(lambda: self._cancelled)
        self._decoder = decoder
        self._detokenizer = detokenizer
        self._finish = finish
        self._result: GenerationResult | None = None
        self._pieces = self._generate()
        self.text = ""
        self.token_ids: list[int] = []
        self.finish_reason = FinishReason.CANCELLED
        self.started_s = self.first_token_s = self.ended_s = 0.0
        self.first_tokens = 0
        """Tokens of the first step: they came with the prompt, and are not counted as decoding."""

    @property
    def stats(self) -> DecodeStats:
        """The decoder's figures of this generation."""
        return self._decoder.stats

    @property
    def result(self) -> GenerationResult:
        """Text and figures; UsageError before the iteration has ended."""
        if self._result is None:
            raise UsageError("the generation has not ended: iterate over the stream first")
        return self._result

    def cancel(self) -> None:
        """End the generation within one step, or within one chunk of the prompt."""
        self._cancelled = True

    def prune(self, max_tokens: int) -> bool:
        """Evict at the next step, so that the context has at most `max_tokens` tokens.

        For whoever watches the memory. May be called from another thread, or between two pieces. Returns False, and
        does nothing, where the policy of the generation lets nothing go.
        """
        return self._decoder.prune(max_tokens)

    def close(self) -> None:
        """End the generation here, by the thread that iterates; the result is there then. Twice is not an error."""
        self.cancel()
        self._pieces.close()
        if self._result is None:  # not a piece was asked for
            self.started_s = self.first_token_s = perf_counter()
            self._end()

    def __iter__(self) -> Iterator[Piece]:
        return self._pieces

    def _generate(self) -> Generator[Piece, None, None]:
        self.started_s = self.first_token_s = perf_counter()
        try:
            for step in self._steps:
                text, tokens = self._take(step.tokens)
                if not self.token_ids and tokens:
                    self.first_token_s = perf_counter()
                    self.first_tokens = len(tokens)
                self.text += text
                self.token_ids += tokens
                if self._stop_strings.matched is not None:
                    self.finish_reason = FinishReason.STOP_STRING
                elif step.finish_reason is not None:
                    self.finish_reason = step.finish_reason
                yield Piece(text, tuple(tokens))
                if self._stop_strings.matched is not None:
                    break
            tail = self._stop_strings.push(self._detokenizer.flush()) + self._stop_strings.flush()
            if tail:
                self.text += tail
                yield Piece(tail)
        finally:
            self._end()

    def _take(self, tokens: list[int]) -> tuple[str, list[int]]:
        """The text of `tokens`, and the tokens up to the one that completed a stop string.

        What follows it was not asked for; and ids must not depend on how many tokens came in the same step.
        """
        text = ""
        for i, token in enumerate(tokens):
            text += self._stop_strings.push(self._detokenizer.push(token))
            if self._stop_strings.matched is not None:
                return text, tokens[: i + 1]
        return text, tokens

    def _end(self) -> None:
        self.ended_s = perf_counter()
        self._result = self._finish(self)


def make_result(
    stream: Stream, *, prompt: Prompt, info: EngineInfo, evicted: tuple[Dropped, ...] = (), measures: Sequence[str] = ()
) -> GenerationResult:
    """The figures of a stream that has ended. `evicted`: what its context has lost; `measures`: the governor's."""
    stats = stream.stats
    generated = len(stream.token_ids)
    decode_s = stream.ended_s - stream.first_token_s
    decoded = max(0, generated - stream.first_tokens)
    condensing, notes = prompt.condensing, []
    dropped = (*prompt.dropped, *evicted)
    if condensing is not None:
        dropped = (*dropped, condensing.dropped)
        notes.append(f"{condensing.dropped.tokens} tokens of the prompt that tell least were not read")
    prepared_s = condensing.seconds if condensing else 0.0
    return GenerationResult(
        text=stream.text,
        token_ids=stream.token_ids,
        prompt_tokens=len(prompt.ids),
        generated_tokens=generated,
        finish_reason=stream.finish_reason,
        load_s=info.load_s,
        ttft_s=prepared_s + stream.first_token_s - stream.started_s,
        decode_tokens_per_s=decoded / decode_s if decoded and decode_s > 0 else 0.0,
        total_s=prepared_s + stream.ended_s - stream.started_s,
        steps=stats.steps,
        drafted=stats.drafted,
        accepted=stats.accepted,
        acceptance_rate=stats.accepted / stats.drafted if stats.drafted else 0.0,
        tokens_per_step=1 + stats.accepted / stats.steps if stats.steps else 0.0,
        drafters=dict(stats.drafters),
        target=info.target,
        draft=info.draft,
        backend=info.backend,
        draft_backend=info.draft_backend,
        recipe=info.recipe,
        threads=info.threads,
        n_ctx=info.n_ctx,
        peak_rss_bytes=peak_rss_bytes(),
        notes=[
            *info.notes,
            *prompt.notes,
            *notes,
            *(f"{part.tokens} tokens in the middle are no longer in the context" for part in evicted),
        ],
        dropped=dropped,
        measures=tuple(measures),
    )


def peak_rss_bytes() -> int:
    """The most memory that this process has held so far, mapped files included."""
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
