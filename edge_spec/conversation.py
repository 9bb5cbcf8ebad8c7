"""A conversation: what was said as text and, so that the cache serves the next turn, as the very ids."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, Unpack

from edge_spec.chat_template import ChatTemplate
from edge_spec.generation import GenerationOptions, Stream
from edge_spec.tokenizer import Tokenizer
from edge_spec.types import FinishReason, GenerationResult, Progress, SamplingParams


class StreamIds(Protocol):
    """Starts a generation after `prompt_ids`; `done` is called with its result once it has ended."""

    def __call__(
        self,
        prompt_ids: list[int],
        *,
        done: Callable[[GenerationResult], None],
        **options: Unpack[GenerationOptions],
    ) -> Stream:
        """Start it."""
        ...


class Chat:
    """Turns of user and model. Made by `Engine.chat`.

    `messages` holds roles and texts so far. The ids that were generated are kept and never tokenised again, so a turn
    reads only what is new; an answer that was cancelled, or left for the next turn, stays as far as it got.
    """

    def __init__(
        self, stream_ids: StreamIds, template: ChatTemplate, tokenizer: Tokenizer, *, system: str | None
    ) -> None:
        self._stream_ids = stream_ids
        self._template = template
        self._tokenizer = tokenizer
        self._system = system
        self.messages: list[dict[str, str]] = []
        self._ids: list[int] = []
        self._answer: Stream | None = None
        """The latest one, which may not have been read to its end."""
        self.reset()

    def reset(self) -> None:
        """Forget every turn; the system prompt stays."""
        self._end_answer()
        self.messages[:] = [{"role": "system", "content": self._system}] if self._system is not None else []
        self._ids = []

    def send(self, text: str, **options: Unpack[GenerationOptions]) -> GenerationResult:
        """Say `text` and wait for the whole answer."""
        stream = self.stream(text, **options)
        for _ in stream:
            pass
        return stream.result

    def stream(
        self,
        text: str,
        *,
        max_tokens: int | None = None,
        sampling: SamplingParams | None = None,
        stop: Sequence[str] = (),
        drafter: str | None = None,
        reference: Sequence[str] = (),
        on_progress: Progress | None = None,
    ) -> Stream:
        """Say `text`; the answer streams. `drafter` and `reference` are for this turn, as in `Engine.stream`.

        Both enter the conversation when the answer has ended. Raises ContextLengthError if the conversation no longer
        fits the window; it is then as it was before.
        """
        self._end_answer()
        messages = [*self.messages, {"role": "user", "content": text}]
        prompt_ids = self._prompt_ids(messages)

        def done(result: GenerationResult) -> None:
            if not result.token_ids:
                return
            self.messages[:] = [*messages, {"role": "assistant", "content": result.text}]
            # A stop string is cut from the text but was written: the ids would say more than the text does.
            kept = result.finish_reason is not FinishReason.STOP_STRING
            self._ids = prompt_ids + result.token_ids if kept else []

        self._answer = self._stream_ids(
            prompt_ids,
            max_tokens=max_tokens,
            sampling=sampling,
            stop=stop,
            drafter=drafter,
            reference=reference,
            on_progress=on_progress,
            done=done,
        )
        return self._answer

    def _end_answer(self) -> None:
        """Close an answer that was left in the middle, which would else come in whenever it is garbage-collected."""
        answer, self._answer = self._answer, None
        if answer is not None:
            answer.close()

    def _prompt_ids(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        tail = ids_after_answer(self._template, self._tokenizer, messages) if self._ids else None
        if tail is None:
            return self._template.render_ids(messages, self._tokenizer)
        kept = list(self._ids)
        if tail[0] in self._tokenizer.stop_ids and kept[-1] in self._tokenizer.stop_ids:
            kept.pop()  # the template ends the answer itself
        return kept + tail


def ids_after_answer(
    template: ChatTemplate, tokenizer: Tokenizer, messages: Sequence[Mapping[str, str]]
) -> list[int] | None:
    """Ids of what the template writes after the last answer: its end, the new question, the mark of the next answer.

    None if the template does not simply append, because it leaves out or changes earlier turns.
    """
    shield = tokenizer.shield("".join([template.text, *(m["content"] for m in messages)]))
    answer, mark = len(messages) - 2, shield.mark * 2
    guarded = [{"role": m["role"], "content": shield.protect(m["content"])} for m in messages]
    guarded[answer]["content"] = mark
    before, found, after = template.render(guarded).rpartition(mark)
    if not found or before != template.render(guarded[:answer]):
        return None
    text, shielded = shield.remove(after)
    return tokenizer.encode(text, special=True, shielded=shielded) or None
