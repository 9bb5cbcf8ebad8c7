"""A conversation: what was said as text and, so that the cache serves the next turn, as the very ids."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Protocol, Unpack

from edge_spec.chat_template import ChatTemplate
from edge_spec.context import Answered, Transcript, make_keeper
from edge_spec.generation import GenerationOptions, Stream
from edge_spec.tokenizer import Tokenizer
from edge_spec.types import Condensing, FinishReason, GenerationResult, Hole, Prompt


class StreamIds(Protocol):
    """Starts a generation after `prompt`; `done` is called with its result, and what its context lost, at its end."""

    def __call__(
        self,
        prompt: Prompt,
        *,
        done: Callable[[GenerationResult, list[Hole]], None],
        **options: Unpack[GenerationOptions],
    ) -> Stream:
        """Start it."""
        ...


class Chat:
    """Turns of user and model. Made by `Engine.chat`.

    `messages` holds roles and texts so far. The ids that were generated are kept and never tokenised again, so a turn
    reads only what is new; an answer that was cancelled, or left for the next turn, stays as far as it got.

    Where the conversation no longer fits the window, parts of it go, as `on_full` says; they stay in `messages`, and
    each result says what the model had not before it any more.
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
        condense: Callable[[str, float | None], tuple[str, Condensing | None]],
    ) -> None:
        """`window`: tokens that the context may have now; `condense` leaves out of a text what tells least.

        Raises UsageError.
        """
        transcript = Transcript(template, tokenizer, system=system)
        self._stream_ids = stream_ids
        self._tokenizer = tokenizer
        self._system = transcript.system
        self._keeper = make_keeper(on_full, transcript)
        self._may_prune = on_full != "error"
        self._window = window
        self._condense = condense
        self.messages: list[dict[str, str]] = []
        self._answer: Stream | None = None
        """The latest one, which may not have been read to its end."""
        self.reset()

    def reset(self) -> None:
        """Forget every turn; the system prompt stays."""
        self._end_answer()
        self.messages[:] = self._system
        self._keeper.reset()

    def send(self, text: str, *, keep: float | None = None, **options: Unpack[GenerationOptions]) -> GenerationResult:
        """Say `text` and wait for the whole answer."""
        stream = self.stream(text, keep=keep, **options)
        for _ in stream:
            pass
        return stream.result

    def stream(self, text: str, *, keep: float | None = None, **options: Unpack[GenerationOptions]) -> Stream:
        """Say `text`; the answer streams. The options are those of `Engine.stream`, and for this turn only.

        With `keep` the model reads that share of `text`, now and later; `messages` hold all of it.

        Both enter the conversation when the answer has ended. Raises ContextLengthError if the conversation does not
        fit the window, even without what may go; it is then as it was before.
        """
        self._end_answer()
        said, condensing = self._condense(text, keep)
        asking = self._keeper.ask(said, n_ctx=self._window(), max_tokens=options.get("max_tokens"))
        before = list(self.messages)

        def done(result: GenerationResult, holes: list[Hole]) -> None:
            if not result.token_ids:
                asking.settle(None)
                return
            self.messages[:] = [*before, {"role": "user", "content": text}]
            self.messages.append({"role": "assistant", "content": result.text})
            ids = result.token_ids
            if result.finish_reason is FinishReason.STOP_STRING and len(holes) == len(asking.prompt.holes):
                # A stop string is cut from the text but was written: the ids would say more than the text does.
                ids = self._tokenizer.encode(result.text)
            asking.settle(Answered(result.text, ids, holes))

        self._answer = self._stream_ids(replace(asking.prompt, condensing=condensing), done=done, **options)
        return self._answer

    def prompt(self, text: str, *, max_tokens: int | None = None) -> Prompt:
        """What would be read if `text` was said now; nothing changes. Raises ContextLengthError."""
        self._end_answer()
        return self._keeper.ask(text, n_ctx=self._window(), max_tokens=max_tokens).prompt

    def prune(self, max_tokens: int) -> int:
        """Drop now what would go when the window is full, so that what is left has at most `max_tokens` tokens.

        For whoever watches the memory, between two answers: an answer that is being written is ended (`Stream.prune`
        is for its middle). Returns the number of tokens that went, 0 where `on_full` is "error" or nothing may go.
        The next result reports them; the cache gives their room up when the next turn is read.
        """
        self._end_answer()
        return self._keeper.prune(max_tokens) if self._may_prune else 0

    def _end_answer(self) -> None:
        """Close an answer that was left in the middle, which would else come in whenever it is garbage-collected."""
        answer, self._answer = self._answer, None
        if answer is not None:
            answer.close()
