"""A conversation: what was said as text and, so that the cache serves the next turn, as the very ids."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Protocol, Unpack

from edge_spec.chat_template import ChatTemplate
from edge_spec.context import ON_FULL, ByTurns, Transcript
from edge_spec.context.transcript import Asked, Turn
from edge_spec.errors import UsageError
from edge_spec.generation import GenerationOptions, Stream
from edge_spec.tokenizer import Tokenizer
from edge_spec.types import Dropped, FinishReason, GenerationResult, Prompt

_ARCHIVE_TOKENS = 8192
"""Dropped text that can still be copied from, the newest of it."""


class StreamIds(Protocol):
    """Starts a generation after `prompt`; `done` is called with its result once it has ended."""

    def __call__(
        self, prompt: Prompt, *, done: Callable[[GenerationResult], None], **options: Unpack[GenerationOptions]
    ) -> Stream:
        """Start it."""
        ...


@dataclass(frozen=True, slots=True)
class _Kept:
    """What of the conversation is in the context, and what has gone from it."""

    turns: tuple[Turn, ...] = ()
    dropped_turns: int = 0
    dropped_tokens: int = 0
    dropped_texts: tuple[str, ...] = field(default=(), repr=False)
    archive: tuple[int, ...] = field(default=(), repr=False)

    @property
    def dropped(self) -> tuple[Dropped, ...]:
        """What has gone, for a result."""
        if not self.dropped_turns:
            return ()
        return (Dropped("turns", self.dropped_tokens, "\n".join(self.dropped_texts)),)

    @property
    def notes(self) -> tuple[str, ...]:
        """The same in a sentence."""
        if not self.dropped_turns:
            return ()
        turns = "1 earlier turn is" if self.dropped_turns == 1 else f"{self.dropped_turns} earlier turns are"
        return (f"{turns} no longer in the context ({self.dropped_tokens} tokens), which was full",)


class Chat:
    """Turns of user and model. Made by `Engine.chat`.

    `messages` holds roles and texts so far. The ids that were generated are kept and never tokenised again, so a turn
    reads only what is new; an answer that was cancelled, or left for the next turn, stays as far as it got.

    With `on_full` "turns" the oldest turns go where the conversation no longer fits the window (see `ByTurns`); they
    stay in `messages`, and each result says what the model had not before it any more.
    """

    def __init__(
        self,
        stream_ids: StreamIds,
        template: ChatTemplate,
        tokenizer: Tokenizer,
        *,
        system: str | None,
        on_full: str = "turns",
        window: Callable[[], int],
    ) -> None:
        """`window`: tokens that the context may have now."""
        if on_full not in ON_FULL:
            raise UsageError(f"on_full={on_full!r}: choose one of {', '.join(ON_FULL)}")
        self._stream_ids = stream_ids
        self._tokenizer = tokenizer
        self._transcript = Transcript(template, tokenizer, system=system)
        self._policy = ByTurns() if on_full == "turns" else None
        self._window = window
        self.messages: list[dict[str, str]] = []
        self._kept = _Kept()
        self._answer: Stream | None = None
        """The latest one, which may not have been read to its end."""
        self.reset()

    def reset(self) -> None:
        """Forget every turn; the system prompt stays."""
        self._end_answer()
        self.messages[:] = self._transcript.system
        self._kept = _Kept()

    def send(self, text: str, **options: Unpack[GenerationOptions]) -> GenerationResult:
        """Say `text` and wait for the whole answer."""
        stream = self.stream(text, **options)
        for _ in stream:
            pass
        return stream.result

    def stream(self, text: str, **options: Unpack[GenerationOptions]) -> Stream:
        """Say `text`; the answer streams. The options are those of `Engine.stream`, and for this turn only.

        Both enter the conversation when the answer has ended. Raises ContextLengthError if the conversation does not
        fit the window, even without the turns that may go; it is then as it was before.
        """
        self._end_answer()
        kept, asked = self._fit(text, options.get("max_tokens"))
        before = list(self.messages)

        def done(result: GenerationResult) -> None:
            self._kept = kept
            if not result.token_ids:
                return
            self.messages[:] = [*before, {"role": "user", "content": text}]
            self.messages.append({"role": "assistant", "content": result.text})
            # A stop string is cut from the text but was written: the ids would say more than the text does.
            cut = result.finish_reason is FinishReason.STOP_STRING
            answered = self._tokenizer.encode(result.text) if cut else result.token_ids
            turn = Turn(text, result.text, asked.asked, answered, asked.is_whole)
            self._kept = replace(kept, turns=(*kept.turns, turn))

        prompt = Prompt(asked.ids, kept.archive, kept.dropped, kept.notes)
        self._answer = self._stream_ids(prompt, done=done, **options)
        return self._answer

    def prune(self, max_tokens: int) -> int:
        """Drop turns now, as when the window is full, until the turns that are left have at most `max_tokens` tokens.

        For whoever watches the memory, between two answers: an answer that is being written is ended. Returns the
        number of tokens that went, 0 where `on_full` forbids it or nothing may go. The next result reports them; the
        cache gives their room up when the next turn is read.
        """
        self._end_answer()
        if self._policy is None:
            return 0
        kept = self._kept
        droppable = max(0, len(kept.turns) - 1)
        count = self._policy.count_down_to(lambda k: self._length(k, ""), droppable, max_tokens)
        self._kept = self._drop(kept, count, "")
        return self._kept.dropped_tokens - kept.dropped_tokens

    def _fit(self, text: str, max_tokens: int | None) -> tuple[_Kept, Asked]:
        """What stays, and the prompt that it makes with the question `text`."""
        kept = self._kept
        if self._policy is not None and kept.turns:
            n_ctx = self._window()
            droppable = len(kept.turns) - 1
            count = self._policy.count(lambda k: self._length(k, text), droppable, n_ctx, max_tokens)
            kept = self._drop(kept, count, text)
            if count == droppable and self._length_of(kept.turns, text) >= n_ctx:
                kept = self._drop(kept, 0, text, pinned=0)  # the first turn too, before nothing can be said
        return kept, self._transcript.ask(kept.turns, text)

    def _length(self, count: int, text: str) -> int:
        """Tokens of a prompt without the `count` oldest turns behind the first."""
        turns = self._kept.turns
        return self._length_of((*turns[:1], *turns[1 + count :]), text)

    def _length_of(self, turns: tuple[Turn, ...], text: str) -> int:
        return len(self._transcript.ask(turns, text).ids)

    def _drop(self, kept: _Kept, count: int, text: str, *, pinned: int = 1) -> _Kept:
        """Without the first turn unless it is pinned, and without the `count` turns behind it."""
        gone = kept.turns[pinned : 1 + count]
        if not gone:
            return kept
        left = (*kept.turns[:pinned], *kept.turns[1 + count :])
        archive = [*kept.archive, *(token for turn in gone for token in self._transcript.copyable(turn))]
        return _Kept(
            left,
            kept.dropped_turns + len(gone),
            kept.dropped_tokens + self._length_of(kept.turns, text) - self._length_of(left, text),
            (*kept.dropped_texts, *(turn.text for turn in gone)),
            tuple(archive[-_ARCHIVE_TOKENS:]),
        )

    def _end_answer(self) -> None:
        """Close an answer that was left in the middle, which would else come in whenever it is garbage-collected."""
        answer, self._answer = self._answer, None
        if answer is not None:
            answer.close()
