"""Twenty turns at a quarter of the window: turns that are pruned, against reading the pruned context every turn."""

from __future__ import annotations

from dataclasses import dataclass, field

from edge_spec import Engine
from edge_spec.conversation import Chat
from edge_spec.decoding.prefix import common_prefix
from edge_spec.types import GenerationResult, Prompt
from pruning_report.texts import fact, filler

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

    Afterwards each turn's prompt is read once more, from an empty cache.
    """
    engine.reset()
    chat = engine.chat(system=_SYSTEM, n_ctx=window)
    report = ChatReport(window, 0, 0, 0.0, 0.0, 0.0)
    dropped, context, prompts = 0, list[int](), list[Prompt]()
    for turn in range(TURNS):
        if turn == TURNS - 1:
            asked = {where: fact(number)[1] for where, number in ASKED.items()}
            behind = {where: chat.prompt(question.text, max_tokens=12) for where, question in asked.items()}
            told = list(chat.messages)
        question = asked["recent turn"].text if turn == TURNS - 1 else _said(turn, padding)
        prompts.append(chat.prompt(question, max_tokens=12))
        report.moved_tokens.append(len(prompts[-1].ids) - common_prefix(context, prompts[-1].ids))
        result, read = _send(chat, question)
        report.read_tokens.append(read)
        report.paid_for_more += report.read_tokens[-1] > report.moved_tokens[-1]
        gone = sum(part.tokens for part in result.dropped)
        report.prunings, dropped = report.prunings + (gone > dropped), gone
        report.ttft_s += result.ttft_s / TURNS
        context = [*prompts[-1].ids, *result.token_ids[:-1]]
    report.whole_tokens = len(engine.template.render_ids(chat.messages, engine.tokenizer))
    for prompt in prompts:
        engine.reset()
        report.reread_ttft_s += _answer(engine, prompt, 1).ttft_s / TURNS
    report.ratio = report.ttft_s / report.reread_ttft_s
    pruned = {where: _answer(engine, prompt).text.strip() for where, prompt in behind.items()}
    for where, one in asked.items():
        messages = [*told, {"role": "user", "content": one.text}]
        whole = Prompt(engine.template.render_ids(messages, engine.tokenizer))
        report.answers[where] = _compare(one.answer, pruned[where], _answer(engine, whole).text.strip())
    return report


def _compare(expected: str, pruned: str, full: str) -> Asked:
    return Asked(expected, pruned, full, pruned == full, expected in pruned, expected in full)


def _answer(engine: Engine, prompt: Prompt, max_tokens: int = 12) -> GenerationResult:
    stream = engine.stream_prompt(prompt, max_tokens=max_tokens, drafter="none")
    for _ in stream:
        pass
    return stream.result


def _send(chat: Chat, question: str) -> tuple[GenerationResult, int]:
    """The answer, and how many tokens were read for it."""
    read = [0]
    result = chat.send(question, max_tokens=12, drafter="none", on_progress=lambda _, total: read.append(total))
    return result, read[-1]


def _said(turn: int, padding: int) -> str:
    said, _ = fact(turn)
    return f"{' '.join(filler(padding, seed=turn))} {said} Say yes if you have noted it."
