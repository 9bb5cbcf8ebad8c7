"""Drafters by themselves: what they propose, and what it costs them."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest

from edge_spec.decoding.session import Session
from edge_spec.drafting import Drafter, LookupDrafter, ModelDrafter, NoDrafter, Request
from edge_spec.errors import GenerationCancelled
from edge_spec.types import Draft, SamplingParams
from tests.fakes import FakeLM
from tests.reference import distribution, greedy_text


def request(sampling: SamplingParams | None = None, **options: object) -> Request:
    defaults: dict[str, object] = {"prompt_length": 1, "max_length": 999, "n_vocab": 16}
    return Request(sampling=sampling or SamplingParams(), rng=np.random.default_rng(0), **(defaults | options))  # type: ignore[arg-type]


def started(drafter: Drafter, sampling: SamplingParams | None = None, **options: object) -> Drafter:
    drafter.start(request(sampling, **options))
    return drafter


def test_no_drafter_proposes_nothing() -> None:
    assert started(NoDrafter()).propose([1, 2, 1, 2], 5) == Draft([])


# ---- lookup


@pytest.mark.parametrize(
    ("context", "tokens"),
    [
        ([], []),
        ([1], []),
        ([1, 2, 3, 4], []),
        ([1, 2, 9, 8, 7, 1, 2], [9, 8]),  # a match of two proposes two
        ([5, 1, 2, 9, 8, 7, 5, 1, 2], [9, 8, 7]),
        ([1, 2, 9, 1, 2, 8, 1, 2], [8, 1]),  # equally long: the latest
        ([5, 1, 2, 9, 0, 1, 2, 8, 5, 1, 2], [9, 0, 1]),  # the longer match beats the later one
        ([1, 9, 2, 1], []),  # one token is not enough
        ([7, 7, 7], [7, 7]),  # overlapping: repeats with its period
        ([3, 4, 3, 4, 3, 4], [3, 4, 3, 4]),
    ],
)
def test_lookup_proposes_what_followed_the_longest_match(context: list[int], tokens: list[int]) -> None:
    assert started(LookupDrafter()).propose(context, 20) == Draft(tokens, None, "lookup")


def test_lookup_keeps_to_every_limit() -> None:
    context = list(range(12)) * 2
    assert len(started(LookupDrafter(max_draft=7)).propose(context, 20).tokens) == 7
    assert len(started(LookupDrafter(max_draft=7)).propose(context, 3).tokens) == 3
    assert started(LookupDrafter(min_match=13)).propose(context, 20).tokens == []
    assert started(LookupDrafter(), stop_ids=frozenset({2})).propose(context, 20).tokens == [0, 1, 2]


def longest_match(context: list[int], min_match: int, max_draft: int) -> list[int]:
    """Prompt lookup by definition, in cubic time."""
    for length in range(len(context) - 1, min_match - 1, -1):
        for start in range(len(context) - length - 1, -1, -1):
            if context[start : start + length] == context[-length:]:
                draft = list(context)
                for i in range(min(length, max_draft)):
                    draft.append(draft[start + length + i])
                return draft[len(context) :]
    return []


@pytest.mark.parametrize("seed", range(8))
def test_lookups_index_follows_any_context(seed: int) -> None:
    """Growing, rejected drafts, other sequences: always as if the index were built anew."""
    rng = random.Random(seed)
    drafter = started(LookupDrafter(max_draft=6))
    context: list[int] = []
    for _ in range(60):
        context = context[: rng.randint(len(context) // 2, len(context))] if rng.random() < 0.4 else context
        context = [*context, *rng.choices(range(3 + seed), k=rng.randrange(5))][:28]
        assert drafter.propose(context, 10).tokens == longest_match(context, 2, 6)


def test_lookup_looks_at_a_bounded_number_of_places() -> None:
    """The pair is everywhere, so an old long match is out of reach: the price of a bounded step."""
    context = [9, 9, 1, 2, 3, *([0, 1, 2] * 30), 9, 9, 1, 2]
    assert started(LookupDrafter()).propose(context, 5).tokens == [9, 9]


# ---- model


def model_drafter(model: FakeLM, **options: float) -> ModelDrafter:
    return ModelDrafter(Session(model), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("sampling", [SamplingParams(), SamplingParams(repetition_penalty=1.5, presence_penalty=0.3)])
def test_a_greedy_model_drafts_what_it_would_write(sampling: SamplingParams) -> None:
    model = FakeLM(seed=3)
    prompt = [1, 2, 3]
    drafter = started(model_drafter(model, draft_tokens=5), sampling, prompt_length=3)
    text = greedy_text(model, prompt, 10, sampling)
    for done in range(5):
        assert drafter.propose([*prompt, *text[:done]], 99) == Draft(text[done : done + 5], None, "model")


@pytest.mark.parametrize(
    "sampling", [SamplingParams(temperature=0.9), SamplingParams(temperature=1.2, repetition_penalty=1.4, top_p=0.7)]
)
def test_q_is_what_each_token_was_sampled_from(sampling: SamplingParams) -> None:
    model = FakeLM(seed=4)
    draft = started(model_drafter(model, draft_tokens=6), sampling, prompt_length=2).propose([1, 2], 99)
    assert draft.q is not None
    assert len(draft.tokens) == len(draft.q) == 6
    for i, (token, q) in enumerate(zip(draft.tokens, draft.q, strict=True)):
        before = draft.tokens[:i]
        expected = distribution(model.logits_after([1, 2, *before]), [1, 2], before, sampling)
        assert token in q.ids
        np.testing.assert_allclose(expected[q.ids], q.probs, rtol=1e-5)
        assert q.probs.sum() == pytest.approx(1)


def test_q_has_at_most_64_tokens_and_sums_to_one() -> None:
    drafter = started(model_drafter(FakeLM(n_vocab=500)), SamplingParams(temperature=2), n_vocab=500)
    q = drafter.propose([1], 1).q
    assert q is not None
    assert len(q[0].ids) == 64
    assert q[0].probs.sum() == pytest.approx(1)


def test_a_model_keeps_to_its_length_the_room_and_the_window() -> None:
    drafter = started(model_drafter(FakeLM(n_ctx=12), draft_tokens=4))
    lengths = [len(drafter.propose(list(range(n)), room).tokens) for n, room in [(3, 9), (4, 2), (10, 9), (12, 9)]]
    assert lengths == [4, 2, 3, 1]
    assert drafter.propose(list(range(13)), 9).tokens == []  # the window is full
    assert len(drafter.propose(list(range(5)), 9).tokens) == 4


def test_a_model_stops_after_a_stop_id() -> None:
    model = FakeLM(seed=3)
    text = greedy_text(model, [1], 5, SamplingParams())
    drafter = started(model_drafter(model, draft_tokens=5), stop_ids=frozenset({text[2]}))
    assert drafter.propose([1], 9).tokens == text[: text.index(text[2]) + 1]


def test_a_model_never_drafts_ids_that_the_target_lacks() -> None:
    """Families pad their vocabularies differently."""
    model = FakeLM(n_vocab=32, seed=1)
    for temperature in (0.0, 5.0):
        sampling = SamplingParams(temperature=temperature)
        drafter = started(model_drafter(model, draft_tokens=30), sampling, n_vocab=4)
        assert max(drafter.propose([1], 30).tokens) < 4


class HalfSure:
    """Drafts up to eight tokens, and only what the model gives at least a half."""

    def worth_drafting(self, confidence: Sequence[float]) -> bool:
        return len(confidence) < 8

    def worth_verifying(self, confidence: Sequence[float]) -> bool:
        return confidence[-1] >= 0.5


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_model_stops_where_it_is_unsure_whatever_it_would_have_drawn(temperature: float) -> None:
    """Were the drawn token to decide, the tokens that are proposed would not be distributed as q says."""
    plain = SamplingParams(temperature=1)
    lengths = set()
    for seed in range(40):
        model = FakeLM(n_vocab=6, seed=seed, sharpness=2.5)
        drafter = model_drafter(model)
        drafter.start(request(SamplingParams(temperature=temperature)))
        drafter.pace = HalfSure()
        tokens = drafter.propose([1], 99).tokens
        for i in range(min(len(tokens) + 1, 8)):
            confidence = distribution(model.logits_after([1, *tokens[:i]]), [], [], plain).max()
            assert (confidence >= 0.5) == (i < len(tokens))
        lengths.add(len(tokens))
    assert len(lengths) >= 4


def test_a_model_reads_each_token_once() -> None:
    """Also the one that is missing after a draft was accepted in full, and those that another drafter brought."""
    model = FakeLM(seed=3)
    drafter = started(model_drafter(model, draft_tokens=2), prompt_length=3)
    context = [1, 2, 3]
    context += [*drafter.propose(context, 9).tokens, 7]
    drafter.propose(context, 9)
    assert [len(call.tokens) for call in model.calls] == [3, 1, 2, 1]
    drafter.propose([*context, 1, 2, 3, 4], 1)
    assert len(model.calls[-1].tokens) == 4


def test_a_new_start_keeps_what_was_read() -> None:
    model = FakeLM()
    drafter = started(model_drafter(model), prompt_length=3)
    drafter.propose([1, 2, 3], 1)
    drafter.start(request(SamplingParams(temperature=1, presence_penalty=1), prompt_length=5))
    drafter.propose([1, 2, 3, 4, 5], 1)
    assert [call.tokens for call in model.calls] == [(1, 2, 3), (4, 5)]


def test_a_model_can_be_cancelled_while_it_reads() -> None:
    model = FakeLM(n_ctx=2000)
    drafter = started(model_drafter(model), cancelled=lambda: model.num_decoded > 0)
    with pytest.raises(GenerationCancelled):
        drafter.propose([1] * 1000, 3)
    assert 0 < model.num_decoded < 1000


def test_closing_gives_the_model_back() -> None:
    model = FakeLM()
    model_drafter(model).close()
    assert model.closed
