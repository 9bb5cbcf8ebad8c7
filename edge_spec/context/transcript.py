"""The turns of a conversation as the very ids that were read and written, and the prompt that they make."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from edge_spec.chat_template import ChatTemplate
from edge_spec.decoding.prefix import common_prefix
from edge_spec.tokenizer import Tokenizer

Message = dict[str, str]


@dataclass(frozen=True, slots=True)
class Turn:
    """One question with its answer."""

    question: str
    answer: str
    asked: list[int]
    """What is read between the answer before and this one: the end of that, the question, marks."""
    answered: list[int]
    is_whole: bool
    """`asked` is all that was read before the answer: the turn came first, or the template does not append."""

    @property
    def messages(self) -> list[Message]:
        """The turn as roles and texts."""
        return [{"role": "user", "content": self.question}, {"role": "assistant", "content": self.answer}]

    @property
    def text(self) -> str:
        """The turn to read."""
        return f"user: {self.question}\nassistant: {self.answer}"


@dataclass(frozen=True, slots=True)
class Asked:
    """A question behind some turns: `ids` is the whole prompt; the next two become a part of its `Turn`."""

    ids: list[int]
    asked: list[int]
    is_whole: bool
    starts: tuple[int, ...] = ()
    """Where each turn but the first begins in `ids`, and the question; nothing where turns do not stand alone."""


class Transcript:
    """Makes prompts of turns, after a system message if there is one.

    Ids are kept and never tokenised again, so that a cache serves later turns, and turns can go without the others'
    ids changing. A template that does not simply append turns makes every prompt anew.
    """

    def __init__(self, template: ChatTemplate, tokenizer: Tokenizer, *, system: str | None) -> None:
        self._template = template
        self._tokenizer = tokenizer
        self.system: list[Message] = [{"role": "system", "content": system}] if system is not None else []

    def ask(self, turns: Sequence[Turn], question: str) -> Asked:
        """The prompt that asks `question` after `turns`."""
        messages = [*self.system, *(m for turn in turns for m in turn.messages), {"role": "user", "content": question}]
        appended = None
        if turns and not any(turn.is_whole for turn in turns[1:]):
            appended = ids_after_answer(self._template, self._tokenizer, messages)
        if appended is None:
            rendered = self._render(messages)
            return Asked(rendered, rendered, is_whole=True)
        ids: list[int] = []
        starts: list[int] = []
        for i, turn in enumerate(turns):
            starts.append(self._extend(ids, turn.asked if i or turn.is_whole else self._opening(turn)))
            ids += turn.answered
        starts.append(self._extend(ids, appended))
        return Asked(ids, appended, is_whole=False, starts=tuple(starts[1:]))

    def copyable(self, turn: Turn) -> list[int]:
        """What a turn said, as ids that may be copied from."""
        return [*(self._tokenizer.encode(turn.question) if turn.is_whole else turn.asked), *turn.answered]

    def _opening(self, turn: Turn) -> list[int]:
        """What is read before the answer of a turn that others came before, now that it comes first."""
        return self._render([*self.system, turn.messages[0]])

    def opening_length(self) -> int:
        """Tokens before the first question's text: the system message and marks."""
        one, other = (self._render([*self.system, {"role": "user", "content": text}]) for text in ("a", "b"))
        return common_prefix(one, other)

    def appends(self) -> bool:
        """Whether the template adds a turn without changing what came before."""
        turn = Turn("a", "b", [], [], is_whole=True)
        messages = [*self.system, *turn.messages, {"role": "user", "content": "c"}]
        return ids_after_answer(self._template, self._tokenizer, messages) is not None

    def ids_after(self, turn: Sequence[Message], question: Message) -> list[int]:
        """What is read after the answer of `turn` (a question and its answer; nothing at the start) for the next."""
        messages = [*self.system, *turn, question]
        asked = ids_after_answer(self._template, self._tokenizer, messages) if turn else None
        return asked if asked is not None else self._render(messages)

    def ends_itself(self, asked: Sequence[int], last: int) -> bool:
        """Whether the template ends the answer although its `last` token does: one of the two is too many."""
        return asked[0] in self._tokenizer.stop_ids and last in self._tokenizer.stop_ids

    def _extend(self, ids: list[int], asked: list[int]) -> int:
        """Append `asked`; returns where it begins."""
        if ids and self.ends_itself(asked, ids[-1]):
            ids.pop()
        start = len(ids)
        ids += asked
        return start

    def _render(self, messages: Sequence[Message]) -> list[int]:
        return self._template.render_ids(messages, self._tokenizer)


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
