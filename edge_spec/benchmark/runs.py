"""Every prompt plainly and speculatively, in turn, in one process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from edge_spec.benchmark.workload import Prompt
from edge_spec.errors import ContextLengthError
from edge_spec.types import DrafterStats, SamplingParams

if TYPE_CHECKING:
    from edge_spec.engine import Engine
    from edge_spec.generation import Stream

PLAIN = "none"
_COPYING = ("auto", "reference")
_WARM_UP, _WARM_UP_TOKENS = "Count from one to twenty.", 8


@dataclass(slots=True)
class Run:
    """One prompt, answered once; sums over its turns, times in seconds."""

    decoded_tokens: int = 0
    """Those after the first step of each turn, which came with the prompt."""
    decode_s: float = 0.0
    ttft_s: float = 0.0
    steps: int = 0
    drafted: int = 0
    accepted: int = 0
    drafters: dict[str, DrafterStats] = field(default_factory=dict)
    own_s: float = 0.0
    """Of the time of the later steps: what was spent outside of both models' passes."""
    steps_s: float = 0.0
    """The later steps as a whole."""
    answers: list[list[int]] = field(default_factory=list)
    """The ids of each turn."""

    @property
    def tokens_per_s(self) -> float | None:
        """Decode rate; None where one pass wrote each answer."""
        return self.decoded_tokens / self.decode_s if self.decoded_tokens and self.decode_s > 0 else None

    def add(self, stream: Stream) -> None:
        """Count a turn that has ended."""
        result, stats = stream.result, stream.stats
        self.answers.append(result.token_ids)
        self.decoded_tokens += max(0, result.generated_tokens - stream.first_tokens)
        self.decode_s += result.total_s - result.ttft_s
        self.ttft_s += result.ttft_s
        self.steps += result.steps
        self.drafted += result.drafted
        self.accepted += result.accepted
        self.drafters = sum_drafters(self.drafters, result.drafters)
        self.own_s += stats.own_s + stats.draft_s - stats.draft_model_s
        self.steps_s += stats.own_s + stats.draft_s + stats.target_s


@dataclass(frozen=True, slots=True)
class Pair:
    """One prompt, run both ways."""

    prompt: Prompt
    plain: Run
    speculative: Run

    @property
    def ratio(self) -> float | None:
        """Speculative over plain decode rate; None where either has none."""
        plain, speculative = self.plain.tokens_per_s, self.speculative.tokens_per_s
        return speculative / plain if plain is not None and speculative is not None else None

    @property
    def same_answers(self) -> bool:
        """Both wrote the same ids."""
        return self.plain.answers == self.speculative.answers


def compare(
    engine: Engine,
    prompts: Sequence[Prompt],
    *,
    max_tokens: int,
    drafter: str = "auto",
    on_skip: Callable[[Prompt, ContextLengthError], None],
) -> Iterator[Pair]:
    """Answer each prompt plainly and with `drafter`, greedily, from empty caches; which goes first alternates.

    Plain is how a user without a draft would run it: its passes are not padded. A short answer of each kind comes
    before the first prompt, so that no run pays for weights that are not in memory yet. A prompt that does not fit the
    window is left out, and `on_skip` told. Raises what else `Engine.stream` raises.
    """
    warm_up = Prompt("", "", (_WARM_UP,))
    for kind in (PLAIN, drafter):
        _run(engine, warm_up, kind, min(max_tokens, _WARM_UP_TOKENS))
    for number, prompt in enumerate(prompts):
        try:
            pair = _run_both(engine, prompt, drafter, max_tokens, plain_first=number % 2 == 0)
        except ContextLengthError as exc:
            on_skip(prompt, exc)
            continue
        yield pair


def repeat(
    engine: Engine, prompts: Sequence[Prompt], times: int, *, max_tokens: int, drafter: str = "auto"
) -> Iterator[Pair]:
    """Answer each prompt both ways `times` times more, as `compare` does, round by round.

    Which goes first alternates with each round. A run that is cut short has about as many pairs of each prompt.
    """
    for number in range(times):
        for prompt in prompts:
            yield _run_both(engine, prompt, drafter, max_tokens, plain_first=number % 2 == 0)


def sum_drafters(one: Mapping[str, DrafterStats], other: Mapping[str, DrafterStats]) -> dict[str, DrafterStats]:
    """What each drafter did in both."""
    total = dict(one)
    for name, stats in other.items():
        before = total.get(name, DrafterStats())
        total[name] = DrafterStats(
            before.steps + stats.steps, before.drafted + stats.drafted, before.accepted + stats.accepted
        )
    return total


def _run_both(engine: Engine, prompt: Prompt, drafter: str, max_tokens: int, *, plain_first: bool) -> Pair:
    order = (PLAIN, drafter) if plain_first else (drafter, PLAIN)
    runs = {kind: _run(engine, prompt, kind, max_tokens) for kind in order}
    return Pair(prompt, runs[PLAIN], runs[drafter])


def _run(engine: Engine, prompt: Prompt, drafter: str, max_tokens: int) -> Run:
    run, say = Run(), _speaker(engine, prompt, drafter, max_tokens)
    engine.reset()
    padding: AbstractContextManager[None] = engine.unpadded() if drafter == PLAIN else nullcontext()
    with padding:
        for text in prompt.turns:
            stream = say(text)
            for _ in stream:
                pass
            run.add(stream)
    return run


def _speaker(engine: Engine, prompt: Prompt, drafter: str, max_tokens: int) -> Callable[[str], Stream]:
    """Takes a turn of this prompt; a single one goes the way of `generate`, several that of `chat`."""
    say = engine.stream if len(prompt.turns) == 1 else engine.chat().stream
    reference = prompt.reference if drafter in _COPYING else ()
    return lambda text: say(
        text, max_tokens=max_tokens, sampling=SamplingParams(), drafter=drafter, reference=reference
    )
