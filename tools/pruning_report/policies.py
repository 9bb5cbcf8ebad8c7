"""What each policy makes of a long prompt, and what the model makes of that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edge_spec import Engine
from edge_spec.context import Sinks, Stretch, Transcript, read_on
from edge_spec.types import GenerationResult, Prompt
from pruning_report.texts import Question

ANSWER_TOKENS = 12


@dataclass(slots=True)
class Outcome:
    """One policy at one ratio: right answers, mean seconds to the first token, mean tokens that were not kept."""

    asked: int = 0
    right: int = 0
    ttft_s: float = 0.0
    dropped_tokens: float = 0.0

    def add(self, result: GenerationResult, question: Question) -> None:
        """Count one answer."""
        dropped = sum(part.tokens for part in result.dropped)
        self.ttft_s = (self.ttft_s * self.asked + result.ttft_s) / (self.asked + 1)
        self.dropped_tokens = (self.dropped_tokens * self.asked + dropped) / (self.asked + 1)
        self.asked += 1
        self.right += question.answer in result.text.replace(",", "")


def answer(engine: Engine, policy: str, keep: float, prompt: str) -> GenerationResult:
    """The answer to a prompt under a policy, from empty caches."""
    engine.reset()
    if policy == "surprisal":
        return engine.generate(prompt, max_tokens=ANSWER_TOKENS, drafter="none", keep=keep)
    return _continue(engine, _prompt(engine, policy, keep, prompt))


def _prompt(engine: Engine, policy: str, keep: float, text: str) -> Prompt:
    transcript = Transcript(engine.template, engine.tokenizer, system=None)
    ids = transcript.ask([], text).ids
    if policy == "full":
        return Prompt(ids)
    context = read_on(Stretch([]), ids, int(keep * len(ids)), Sinks(transcript.opening_length(), low=0.9))
    return Prompt(context.ids, context.holes)


def _continue(engine: Engine, prompt: Prompt) -> GenerationResult:
    stream = engine.stream_prompt(prompt, max_tokens=ANSWER_TOKENS, drafter="none")
    for _ in stream:
        pass
    return stream.result


def recall(engine: Engine, policy: str, keep: float, facts: Sequence[tuple[str, Question]]) -> Outcome:
    """Tell one fact a turn, then ask for each, behind the same turns."""
    size = sum(engine.count(said) + 12 for said, _ in facts) + 60
    n_ctx = None if policy == "full" else max(64, int(keep * size))
    engine.reset()
    chat = engine.chat(system="Answer briefly.", on_full={"full": "error"}.get(policy, policy), n_ctx=n_ctx)
    for said, _ in facts:
        chat.send(said, max_tokens=4, drafter="none")
    outcome = Outcome()
    for _, question in facts:
        outcome.add(_continue(engine, chat.prompt(question.text, max_tokens=ANSWER_TOKENS)), question)
    return outcome


def perplexity(engine: Engine, policy: str, keep: float, text: str, *, scored: int) -> tuple[float, int]:
    """Of the last `scored` tokens of `text`, behind what the policy leaves of those before; and how many went."""
    tokenizer = engine.tokenizer
    ids = tokenizer.encode(text)
    prompt, after = Prompt(ids[:-scored]), ids[-scored:]
    if policy == "surprisal":
        prompt = Prompt(tokenizer.encode(engine.condense(tokenizer.decode(prompt.ids), keep)[0]))
    elif policy == "sinks":
        context = read_on(Stretch([]), prompt.ids, int(keep * len(prompt.ids)), Sinks(low=0.9))
        prompt = Prompt(context.ids, context.holes)
    engine.reset()
    told = engine.score(prompt, after)
    return float(np.exp(told.mean())), len(ids) - scored - len(prompt.ids)
