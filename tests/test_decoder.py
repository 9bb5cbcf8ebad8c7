"""The loop's laws: the same text as without a draft, the target's own distribution, and every way to end."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from edge_spec.answer_file import AnswerFile
from edge_spec.decoding import SpeculativeDecoder, Step
from edge_spec.decoding.session import PREFILL_CHUNK, Session
from edge_spec.drafting import (
    CascadeDrafter,
    Costs,
    Drafter,
    HistoryDrafter,
    LookupDrafter,
    ModelDrafter,
    NoDrafter,
    PastAnswers,
    Planner,
    ReferenceDrafter,
    Request,
)
from edge_spec.errors import BackendError, ContextLengthError, UsageError
from edge_spec.types import Context, Draft, DrafterStats, FinishReason, SamplingParams
from tests.fakes import FakeLM, FakeTokenizer, ScriptedLM
from tests.reference import assert_drawn_from, greedy_text, text_distribution

PROMPT = [1, 2, 3]


def run(
    model: FakeLM, drafter: Drafter | None = None, prompt: list[int] | None = None, **options: object
) -> list[Step]:
    decoder = SpeculativeDecoder(Session(model), drafter)
    return list(decoder.generate(prompt or PROMPT, **options))  # type: ignore[arg-type]


def tokens_of(steps: list[Step]) -> list[int]:
    return [token for step in steps for token in step.tokens]


def model_drafter(n_vocab: int, seed: int, n_ctx: int = 64, **options: float) -> ModelDrafter:
    return ModelDrafter(Session(FakeLM(n_vocab, n_ctx, seed, name="draft")), **options)  # type: ignore[arg-type]


class RandomDrafter(Drafter):
    """Guesses at random, sometimes nothing: the loop must not mind."""

    name = "random"

    def __init__(self, n_vocab: int, seed: int) -> None:
        self._random = random.Random(seed)
        self._n_vocab = n_vocab

    def propose(self, context: Context, max_tokens: int) -> Draft:
        length = self._random.randint(0, max_tokens)
        return Draft(self._random.choices(range(self._n_vocab), k=length), source=self.name)


class OracleDrafter(Drafter):
    """Proposes what will be written."""

    name = "oracle"

    def __init__(self, text: list[int], prompt_length: int) -> None:
        self._text = text
        self._prompt_length = prompt_length

    def propose(self, context: Context, max_tokens: int) -> Draft:
        done = len(context) - self._prompt_length
        return Draft(self._text[done : done + max_tokens], source=self.name)


class UnsureDrafter(ModelDrafter):
    """A model that proposes only what it gives more than 0.3."""

    def start(self, request: Request) -> None:
        super().start(request)
        self.pace = self

    def worth_drafting(self, confidence: Sequence[float]) -> bool:
        return len(confidence) < 6

    def worth_verifying(self, confidence: Sequence[float]) -> bool:
        return confidence[-1] >= 0.3


def planner(model: ModelDrafter | None, *more: Drafter) -> Planner:
    """A planner for a target of whose passes nothing is known."""
    lookup = LookupDrafter(min_match=1, max_draft=7, bold=True)
    costs, fixed = (Costs(max_rows=8, draft_share=0.01) for _ in range(2))  # the model is worth a try at once
    return Planner(costs, lookup, model, more=more, fixed=fixed)


class References(ReferenceDrafter):
    """Copies from texts of its own, half of it what such a model wrote: sometimes right, often not."""

    def __init__(self, n_vocab: int, seed: int) -> None:
        super().__init__(min_match=1 + seed % 3, max_draft=1 + seed % 7, bold=seed % 2 == 0)
        rng = random.Random(seed)
        written = greedy_text(FakeLM(n_vocab, seed=seed // 7), [rng.randrange(n_vocab)], 40, SamplingParams())
        self._texts = tuple(written), tuple(rng.choices(range(n_vocab), k=40))

    def start(self, request: Request) -> None:
        super().start(replace(request, references=self._texts))


class OldAnswers(AnswerFile):
    """Answers that were never in a file."""

    def __init__(self, *answers: Sequence[int]) -> None:
        super().__init__(Path("nowhere"))
        self._answers = answers

    def read(self) -> list[NDArray[np.int32]]:
        return [np.array(answer, np.int32) for answer in self._answers]


def history(n_vocab: int, seed: int, *, bold: bool = False) -> HistoryDrafter:
    """Copies from what such a model wrote, and from noise."""
    rng = random.Random(seed)
    written = greedy_text(FakeLM(n_vocab, seed=seed // 7), [rng.randrange(n_vocab)], 40, SamplingParams())
    answers = OldAnswers(rng.choices(range(n_vocab), k=40), written)
    return HistoryDrafter(PastAnswers(answers), max_draft=1 + seed % 7, bold=bold)


DRAFTERS: dict[str, Callable[[int, int], Drafter]] = {
    "none": lambda n_vocab, seed: NoDrafter(),
    "random": RandomDrafter,
    "lookup": lambda n_vocab, seed: LookupDrafter(max_draft=1 + seed % 7),
    "model": lambda n_vocab, seed: model_drafter(n_vocab, seed, draft_tokens=1 + seed % 5),
    "self": lambda n_vocab, seed: model_drafter(n_vocab, seed // 7, draft_tokens=3),
    "unsure": lambda n_vocab, seed: UnsureDrafter(Session(FakeLM(n_vocab, 64, seed // 7))),
    "cascade": lambda n_vocab, seed: CascadeDrafter(
        Session(FakeLM(n_vocab, 64, seed // 7, name="draft")), draft_tokens=1 + seed % 5
    ),
    "short window": lambda n_vocab, seed: model_drafter(n_vocab, seed // 7, n_ctx=16),
    "planner": lambda n_vocab, seed: planner(model_drafter(n_vocab, seed // 7)),
    "planner without a model": lambda n_vocab, seed: planner(None),
    "reference": References,
    "history": history,
    "planner with history": lambda n_vocab, seed: planner(None, history(n_vocab, seed, bold=True)),
    "planner with references": lambda n_vocab, seed: planner(
        model_drafter(n_vocab, seed // 7), References(n_vocab, seed - seed % 2)
    ),
}


@pytest.mark.parametrize("kind", DRAFTERS)
def test_greedy_text_is_the_targets_own(kind: str) -> None:
    """For every drafter, length, penalty, limit and stop id, over random models."""
    accepted = 0
    for case in range(40):
        rng = random.Random(case)
        n_vocab = rng.choice([3, 8, 16])
        sampling = SamplingParams(
            repetition_penalty=rng.choice([1.0, 1.0, 1.3]),
            presence_penalty=rng.choice([0.0, 0.0, 0.5]),
            frequency_penalty=rng.choice([0.0, 0.2]),
        )
        prompt = rng.choices(range(n_vocab), k=rng.randint(1, 20))
        max_tokens, stop_ids = rng.randint(1, 50), rng.choice([(), (), (0,), (1, 2)])
        model = FakeLM(
            n_vocab, rng.choice([24, 64]), case // 7, max_rows=rng.randint(1, 8), max_rollback=rng.choice([None, 1])
        )
        steps = run(
            model,
            DRAFTERS[kind](n_vocab, case),
            prompt,
            sampling=sampling,
            max_tokens=max_tokens,
            stop_ids=stop_ids,
            max_draft=rng.choice([None, None, 0, 2]),
        )
        assert tokens_of(steps) == greedy_text(model, prompt, max_tokens, sampling, stop_ids)
        assert [step.finish_reason is None for step in steps] == [True] * (len(steps) - 1) + [False]
        accepted += sum(step.accepted for step in steps)
    assert (accepted > 0) == (kind != "none")


SAMPLINGS = {
    "plain": SamplingParams(temperature=1.0),
    "filters": SamplingParams(temperature=1.3, top_k=4, top_p=0.9, min_p=0.1),
    "penalties": SamplingParams(temperature=1.0, repetition_penalty=1.4, presence_penalty=0.4, frequency_penalty=0.3),
    "all": SamplingParams(
        temperature=1.2, repetition_penalty=1.3, frequency_penalty=0.3, top_k=4, top_p=0.9, min_p=0.1
    ),
}


@pytest.mark.parametrize(
    "kind",
    [
        "none",
        "random",
        "lookup",
        "model",
        "unsure",
        "cascade",
        "planner",
        "reference",
        "history",
        "planner with history",
        "planner with references",
    ],
)
@pytest.mark.parametrize("name", SAMPLINGS)
def test_sampled_text_has_the_targets_distribution(name: str, kind: str) -> None:
    """Whole texts of four tokens against their exact probabilities.

    Odds of failing by chance: one in a million a case. The seeds are fixed.
    """
    n_vocab, prompt = 5, [0, 1, 2, 0, 1]
    model = FakeLM(n_vocab, seed=2, sharpness=1.0)
    decoder = SpeculativeDecoder(Session(model), DRAFTERS[kind](n_vocab, 3))
    counts: Counter[tuple[int, ...]] = Counter()
    fields = {field: getattr(SAMPLINGS[name], field) for field in SamplingParams.__dataclass_fields__}
    for seed in range(500):
        steps = decoder.generate(prompt, sampling=SamplingParams(**(fields | {"seed": seed})), max_tokens=4)
        counts[tuple(tokens_of(list(steps)))] += 1
    assert_drawn_from(counts, text_distribution(model, prompt, 4, SAMPLINGS[name]))


@pytest.mark.parametrize("temperature", [0.0, 1.0, 2.0])
def test_a_self_draft_is_accepted_whole(temperature: float) -> None:
    drafter = model_drafter(16, 5, draft_tokens=3)
    steps = run(FakeLM(seed=5), drafter, sampling=SamplingParams(temperature=temperature, seed=1), max_tokens=40)
    assert all(step.accepted == step.drafted == 3 for step in steps)
    assert len(steps) == 10


@pytest.mark.parametrize("kind", DRAFTERS)
def test_the_same_seed_writes_the_same_text(kind: str) -> None:
    def text(seed: int) -> list[int]:
        sampling = SamplingParams(temperature=1.5, seed=seed)
        return tokens_of(run(FakeLM(), DRAFTERS[kind](16, 3), sampling=sampling, max_tokens=30))

    assert text(1) == text(1)
    assert text(1) != text(2)


@pytest.mark.parametrize("kind", ["none", "self", "lookup"])
@pytest.mark.parametrize("max_tokens", [1, 2, 3, 7])
def test_max_tokens_is_held(kind: str, max_tokens: int) -> None:
    steps = run(FakeLM(), DRAFTERS[kind](16, 0), max_tokens=max_tokens)
    assert len(tokens_of(steps)) == max_tokens
    assert steps[-1].finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize("kind", ["none", "self", "lookup"])
@pytest.mark.parametrize("prompt_length", [1, 5, 62, 63])
def test_the_window_is_filled_to_its_last_token(kind: str, prompt_length: int) -> None:
    steps = run(FakeLM(n_ctx=64), DRAFTERS[kind](16, 0), [1] * prompt_length)
    assert len(tokens_of(steps)) == 64 - prompt_length
    assert steps[-1].finish_reason is FinishReason.CONTEXT_FULL


def test_a_prompt_that_leaves_no_room_is_refused_at_the_call() -> None:
    model = FakeLM(n_ctx=8)
    with pytest.raises(ContextLengthError) as caught:
        SpeculativeDecoder(Session(model)).generate([1] * 8)
    assert (caught.value.needed, caught.value.n_ctx) == (8, 8)
    assert model.calls == []


@pytest.mark.parametrize(
    ("prompt", "options"),
    [([], {}), ([1, 16], {}), ([-1], {}), ([1], {"max_tokens": 0}), ([1], {"max_draft": -1})],
)
def test_what_cannot_be_honoured_is_refused_at_the_call(prompt: list[int], options: dict[str, int]) -> None:
    with pytest.raises(UsageError):
        SpeculativeDecoder(Session(FakeLM())).generate(prompt, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("length", range(1, 6))
def test_a_stop_id_ends_the_text_wherever_it_falls_in_a_draft(length: int) -> None:
    tokenizer = FakeTokenizer()
    script = tokenizer.encode("abcde"[:length])
    written = [*script, tokenizer.eot_id]
    model = ScriptedLM(script, tokenizer.eot_id)
    drafter = OracleDrafter([*written, 1, 2, 3], len(PROMPT))
    (step,) = run(model, drafter, stop_ids=tokenizer.stop_ids)
    assert step.tokens == written
    assert step.finish_reason is FinishReason.STOP


def test_a_step_yields_the_accepted_tokens_and_the_next() -> None:
    model = FakeLM(max_rows=4)
    text = greedy_text(model, PROMPT, 8, SamplingParams())
    wrong = [*text[:5], (text[5] + 1) % 16, *text[6:]]
    steps = run(model, OracleDrafter(wrong, len(PROMPT)), max_tokens=8)
    assert [(step.tokens, step.source, step.drafted, step.accepted) for step in steps] == [
        (text[:4], "oracle", 3, 3),
        (text[4:6], "oracle", 3, 1),
        (text[6:8], "oracle", 1, 1),
    ]


def test_statistics_add_up_by_drafter() -> None:
    decoder = SpeculativeDecoder(Session(FakeLM()), planner(model_drafter(16, 1)))
    steps = list(decoder.generate(PROMPT, max_tokens=50))
    stats = decoder.stats
    assert stats.steps == len(steps)
    assert stats.drafted == sum(step.drafted for step in steps)
    assert stats.accepted == sum(step.accepted for step in steps)
    assert {"model"} <= set(stats.drafters) <= {"lookup", "model", "none"}
    for name in stats.drafters:
        mine = [step for step in steps if step.source == name]
        expected = DrafterStats(len(mine), sum(step.drafted for step in mine), sum(step.accepted for step in mine))
        assert stats.drafters[name] == expected
    assert min(stats.prefill_s, stats.draft_s, stats.target_s, stats.own_s) > 0


@pytest.mark.parametrize("kind", ["none", "self", "lookup", "planner"])
def test_cancelling_takes_effect_within_one_step(kind: str) -> None:
    model = FakeLM()
    decoder = SpeculativeDecoder(Session(model), DRAFTERS[kind](16, 0))
    seen: list[Step] = []
    calls = 0
    for step in decoder.generate(PROMPT, cancelled=lambda: len(seen) == 3):
        calls = calls if step.finish_reason else len(model.calls)
        seen.append(step)
    assert len(seen) == 4
    assert seen[-1] == Step([], finish_reason=FinishReason.CANCELLED)
    assert len(model.calls) == calls


def test_cancelling_while_the_prompt_is_read_keeps_what_was_read() -> None:
    model = FakeLM(n_ctx=1000)
    prompt = [i % 16 for i in range(900)]
    decoder = SpeculativeDecoder(Session(model))
    (step,) = decoder.generate(prompt, cancelled=lambda: model.num_decoded > 0)
    assert step == Step([], finish_reason=FinishReason.CANCELLED)
    assert model.num_decoded == PREFILL_CHUNK
    assert len(tokens_of(list(decoder.generate(prompt, max_tokens=1)))) == 1
    assert model.num_decoded == 900


def test_progress_is_told_while_the_prompt_is_read_only_and_may_cancel() -> None:
    seen: list[tuple[int, int]] = []
    prompt = [1] * (PREFILL_CHUNK + 2)
    run(FakeLM(n_ctx=1000), prompt=prompt, max_tokens=5, on_progress=lambda *counts: seen.append(counts))
    assert seen == [(PREFILL_CHUNK, PREFILL_CHUNK + 2), (PREFILL_CHUNK + 2, PREFILL_CHUNK + 2)]
    (step,) = run(FakeLM(n_ctx=1000), prompt=prompt, on_progress=lambda *counts: False)
    assert step.finish_reason is FinishReason.CANCELLED


@pytest.mark.parametrize("fail_at", [0, 1, 4])
@pytest.mark.parametrize("whose", ["target", "draft"])
def test_after_a_failure_the_decoder_is_as_good_as_new(fail_at: int, whose: str) -> None:
    target = FakeLM(order=None, fail_at=fail_at if whose == "target" else None)
    draft = FakeLM(order=None, fail_at=fail_at if whose == "draft" else None)
    decoder = SpeculativeDecoder(Session(target), ModelDrafter(Session(draft)))
    with pytest.raises(BackendError):
        list(decoder.generate(PROMPT, max_tokens=30))
    again = tokens_of(list(decoder.generate(PROMPT, max_tokens=30)))
    assert again == greedy_text(target, PROMPT, 30, SamplingParams())


@pytest.mark.parametrize("kind", ["none", "random", "self", "planner"])
def test_an_abandoned_generation_leaves_a_usable_decoder(kind: str) -> None:
    model = FakeLM(order=None)
    decoder = SpeculativeDecoder(Session(model), DRAFTERS[kind](16, 0))
    for _ in decoder.generate(PROMPT):
        break
    assert tokens_of(list(decoder.generate([4, 5], max_tokens=20))) == greedy_text(model, [4, 5], 20, SamplingParams())


@pytest.mark.parametrize("kind", ["none", "self", "planner"])
def test_the_next_turn_reads_only_what_is_new(kind: str) -> None:
    model = FakeLM()
    decoder = SpeculativeDecoder(Session(model), DRAFTERS[kind](16, 0))
    context = [*PROMPT, *tokens_of(list(decoder.generate(PROMPT, max_tokens=9)))]
    calls = len(model.calls)
    next(iter(decoder.generate([*context, 7, 8], max_tokens=1)))
    # The last token that was written was never read; with it, the two new ones.
    (call,) = model.calls[calls:]
    assert call.tokens == (context[-1], 7, 8)


def test_plain_decoding_reads_every_token_once() -> None:
    model = FakeLM()
    run(model, max_tokens=20)
    assert model.num_decoded == len(PROMPT) + 19
    assert [call.rows for call in model.calls] == [1] * 20


def test_a_draft_costs_its_own_rows_and_no_more() -> None:
    model = FakeLM(seed=5)
    run(model, model_drafter(16, 5, draft_tokens=3), max_tokens=40)
    assert [len(call.tokens) for call in model.calls] == [len(PROMPT) + 3] + [4] * 9


def test_a_refused_rollback_costs_time_only() -> None:
    model = FakeLM(max_rollback=0)
    session = Session(model)
    steps = SpeculativeDecoder(session, RandomDrafter(16, 1)).generate(PROMPT, max_tokens=40)
    assert tokens_of(list(steps)) == greedy_text(model, PROMPT, 40, SamplingParams())
    assert session.num_refused_rollbacks > 5


def test_logits_that_are_not_numbers_end_the_generation_with_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model = FakeLM()
    monkeypatch.setattr(model, "logits_after", lambda sequence: np.full(16, np.nan, np.float32))
    with pytest.raises(BackendError, match="not numbers"):
        run(model)


def test_a_drafter_that_overdraws_is_our_bug() -> None:
    class Greedy(Drafter):
        name = "greedy"

        def propose(self, context: Context, max_tokens: int) -> Draft:
            return Draft([1] * (max_tokens + 1), source=self.name)

    with pytest.raises(AssertionError, match="greedy drafted more"):
        run(FakeLM(), Greedy())
