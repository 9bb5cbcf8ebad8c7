"""Twenty turns at a quarter of the window: turns that are pruned, against reading the pruned context every turn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from edge_spec import Engine
from edge_spec.decoding.prefix import common_prefix
from edge_spec.generation import Stream
from edge_spec.types import GenerationResult, Prompt
from pruning_report.texts import Question, fact, filler

TURNS = 20
ASKED = {"pinned first turn": 0, "dropped turn": TURNS // 2, "recent turn": TURNS - 2}
"""Whose fact is asked for at the end; only the last of these is the twentieth turn's question."""
_SYSTEM = "Answer in a few words."


@dataclass(slots=True)
class Asked:
    """The same question behind the pruned context, and behind all twenty turns."""

    expected: str
    pruned: str
    full: str
    same_text: bool
    pruned_is_right: bool
    full_is_right: bool


@dataclass(slots=True)
class ChatReport:
    """Seconds are means over the turns, of the time to the first token."""

    window: int
    whole_tokens: int
    prunings: int
    ttft_s: float
    reread_ttft_s: float
    ratio: float
    read_tokens: list[int] = field(default_factory=list)
    """Tokens that each turn read."""
    moved_tokens: list[int] = field(default_factory=list)
    """Of each turn's prompt, those behind what it shares with what was read and written before: moved, or new."""
    paid_for_more: int = 0
    """Turns that read more than those."""
    answers: dict[str, Asked] = field(default_factory=dict)
    """By where the fact was said."""


def measure(engine: Engine, *, window: int, padding: int) -> ChatReport:
    """`padding`: filler sentences a question. The last question asks for what was said in the turn before it.

    After each turn its prompt is read once more from an empty cache; then the conversation gets its cache back, in a
    time that counts for nobody.
    """
    chat = engine.chat(system=_SYSTEM, n_ctx=window)
    report = ChatReport(window, 0, 0, 0.0, 0.0, 0.0)
    dropped, context = 0, list[int]()
    for turn in range(TURNS):
        question = fact(TURNS - 2)[1].text if turn == TURNS - 1 else _said(turn, padding)
        prompt = chat.prompt(question, max_tokens=12)
        if turn == TURNS - 1:
            for where, number in ASKED.items():
                asked = fact(number)[1]
                pruned = chat.prompt(asked.text, max_tokens=12)
                report.answers[where] = _ask(engine, chat.messages, pruned, asked)
            _read(engine, context)
        report.moved_tokens.append(len(prompt.ids) - common_prefix(context, prompt.ids))
        read = [0]
        result = chat.send(question, max_tokens=12, drafter="none", on_progress=lambda _, total: read.append(total))
        report.read_tokens.append(read[-1])
        report.paid_for_more += report.read_tokens[-1] > report.moved_tokens[-1]
        gone = sum(part.tokens for part in result.dropped)
        report.prunings, dropped = report.prunings + (gone > dropped), gone
        report.ttft_s += result.ttft_s / TURNS
        engine.reset()
        report.reread_ttft_s += _run(engine.stream_prompt(prompt, max_tokens=1, drafter="none")).ttft_s / TURNS
        context = [*prompt.ids, *result.token_ids[:-1]]
        _read(engine, context)
    report.ratio = report.ttft_s / report.reread_ttft_s
    report.whole_tokens = len(engine.template.render_ids(chat.messages, engine.tokenizer))
    return report


def _said(turn: int, padding: int) -> str:
    said, _ = fact(turn)
    return f"{' '.join(filler(padding, seed=turn))} {said} Say yes if you have noted it."


def _ask(engine: Engine, messages: Sequence[dict[str, str]], prompt: Prompt, question: Question) -> Asked:
    whole = engine.template.render_ids([*messages, {"role": "user", "content": question.text}], engine.tokenizer)
    pruned, full = (
        _run(engine.stream_prompt(made, max_tokens=12, drafter="none")).text.strip() for made in (prompt, Prompt(whole))
    )
    expected = question.answer
    return Asked(expected, pruned, full, pruned == full, expected in pruned, expected in full)


def _read(engine: Engine, context: Sequence[int]) -> None:
    _run(engine.stream_prompt(Prompt(list(context)), max_tokens=1, drafter="none"))


def _run(stream: Stream) -> GenerationResult:
    for _ in stream:
        pass
    return stream.result
