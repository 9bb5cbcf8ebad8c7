"""What each policy makes of a long prompt, and what the model makes of that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edge_spec import Engine
from edge_spec.context import Sinks, Stretch, Surprisal, Transcript, draft_score, read_on
from edge_spec.drafting import ModelDrafter
from edge_spec.types import Hole, Prompt
from pruning_report.texts import Question

POLICIES = ("full", "surprisal", "sinks")


@dataclass(slots=True)
class Outcome:
    """One policy at one ratio: right answers, mean seconds to the first token, mean tokens that were not kept."""

    asked: int = 0
    right: int = 0
    ttft_s: float = 0.0
    dropped_tokens: float = 0.0

    def add(self, *, right: bool, ttft_s: float, dropped: int) -> None:
        """Count one answer."""
        self.ttft_s = (self.ttft_s * self.asked + ttft_s) / (self.asked + 1)
        self.dropped_tokens = (self.dropped_tokens * self.asked + dropped) / (self.asked + 1)
        self.asked += 1
        self.right += right


def answer(engine: Engine, policy: str, keep: float, prompt: str, question: Question) -> tuple[bool, float, int]:
    """Whether the answer is right, seconds to the first token, tokens that went. From an empty cache."""
    engine.reset()
    if policy == "surprisal":
        result = engine.generate(prompt, max_tokens=16, drafter="none", keep=keep)
    else:
        made = _prompt(engine, policy, keep, prompt)
        stream = engine._stream_ids(made, max_tokens=16, drafter="none")
        for _ in stream:
            pass
        result = stream.result
    said = result.text.replace(",", "")
    return question.answer in said, result.ttft_s, sum(part.tokens for part in result.dropped)


def _prompt(engine: Engine, policy: str, keep: float, text: str) -> Prompt:
    transcript = Transcript(engine._source.template, engine._source.tokenizer, system=None)
    ids = transcript.ask([], text).ids
    if policy == "full":
        return Prompt(ids)
    context = read_on(Stretch([]), ids, int(keep * len(ids)), Sinks(transcript.opening_length(), low=0.9))
    return Prompt(context.ids, context.holes)


def recall(engine: Engine, policy: str, keep: float, facts: Sequence[tuple[str, Question]]) -> list[tuple[bool, int]]:
    """Tell one fact a turn, then ask for each: whether the answer is right, and tokens that had gone."""
    on_full = {"full": "error"}.get(policy, policy)
    chat = engine.chat(system="Answer briefly.", on_full=on_full)
    size = sum(engine.count(said) + 12 for said, _ in facts) + 60
    n_ctx = engine.info.n_ctx if policy == "full" else max(64, int(keep * size))
    chat._window = lambda: n_ctx
    for said, _ in facts:
        chat.send(said, max_tokens=4, drafter="none")
    outcomes = []
    for _, question in facts:
        asking = chat._keeper.ask(question.text, n_ctx=n_ctx + 40, max_tokens=16)
        stream = engine._stream_ids(asking.prompt, max_tokens=16, drafter="none")
        for _ in stream:
            pass
        right = question.answer in stream.result.text.replace(",", "")
        outcomes.append((right, sum(part.tokens for part in stream.result.dropped)))
    return outcomes


def perplexity(engine: Engine, policy: str, keep: float, text: str, *, scored: int) -> float:
    """Of the last `scored` tokens of `text`, behind what the policy leaves of those before."""
    tokenizer, target = engine._source.tokenizer, engine._target
    ids = tokenizer.encode(text)
    before, after = ids[:-scored], ids[-scored:]
    holes: tuple[Hole, ...] = ()
    if policy == "surprisal":
        model = engine._drafters["model"]
        assert isinstance(model, ModelDrafter)
        score = draft_score(model.session, room=model.session.spec.n_ctx - 1)
        before = tokenizer.encode(Surprisal(keep).condense(tokenizer.decode(before), tokenizer, score).text)
    elif policy == "sinks":
        context = read_on(Stretch([]), before, int(keep * len(before)), Sinks(low=0.9))
        before, holes = context.ids, context.holes
    target.forget()
    total, context_ids = 0.0, [*before, after[0]]
    rows = target.spec.max_rows
    for first in range(1, len(after), rows):
        part = after[first : first + rows]
        decoded = target.decode([*context_ids, *part], rows=min(len(part) + 1, rows), holes=holes)
        logits = decoded.logits[:-1].astype(np.float64) if len(part) < rows else decoded.logits.astype(np.float64)
        offset = 0 if len(part) < rows else 1
        told = part[offset:]
        logits = logits[: len(told)]
        best = logits.max(axis=1)
        norm = best + np.log(np.exp(logits - best[:, None]).sum(axis=1))
        total += float((norm - logits[np.arange(len(told)), told]).mean()) * len(part)
        context_ids += part
    return float(np.exp(total / (len(after) - 1)))
