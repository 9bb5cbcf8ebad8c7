"""From one message, or a text to continue, to the ids that are read."""

from __future__ import annotations

from dataclasses import dataclass

from edge_spec.chat_template import ChatTemplate
from edge_spec.context import Sinks, Stretch, Transcript, read_on
from edge_spec.context.sinks import MIN_SINKS
from edge_spec.errors import UsageError
from edge_spec.tokenizer import Tokenizer
from edge_spec.types import Prompt

ON_FULL = ("sinks", "error")
"""What a single prompt can do with a full window: it has no turns."""


@dataclass(frozen=True, slots=True)
class Prompting:
    """Makes prompts for one model."""

    template: ChatTemplate
    tokenizer: Tokenizer

    def make(self, text: str, *, system: str | None, raw: bool, on_full: str, n_ctx: int) -> Prompt:
        """The prompt of a message in the model's chat template, or with `raw` of a text to continue.

        With `on_full` "sinks" a prompt that does not fit `n_ctx` tokens loses its middle. Raises UsageError.
        """
        if on_full not in ON_FULL:
            raise UsageError(f"on_full={on_full!r}: choose one of {', '.join(ON_FULL)} for a single prompt")
        if raw and system is not None:
            raise UsageError("a raw prompt has no place for a system message")
        transcript = Transcript(self.template, self.tokenizer, system=system)
        ids = self.tokenizer.encode(text, add_bos=self.tokenizer.add_bos) if raw else transcript.ask([], text).ids
        if on_full == "error" or not ids:
            return Prompt(ids)
        policy = Sinks(MIN_SINKS if raw else max(MIN_SINKS, transcript.opening_length()))
        context = read_on(Stretch([]), ids, n_ctx, policy)
        return Prompt(context.ids, context.holes, policy, tuple(t for hole in context.holes for t in hole.tokens))
