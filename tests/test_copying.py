"""Copying from given texts: what is found, what is proposed, and what the planner makes of it."""

from __future__ import annotations

import random

import numpy as np
import pytest

from edge_spec.decoding.decoder import SpeculativeDecoder
from edge_spec.decoding.session import Session
from edge_spec.drafting import Costs, LookupDrafter, Planner, ReferenceDrafter, Request
from edge_spec.drafting.corpus import Corpus
from edge_spec.types import SamplingParams
from tests.fakes import FakeLM


def request(*references: list[int], stop_ids: frozenset[int] = frozenset()) -> Request:
    return Request(
        sampling=SamplingParams(),
        rng=np.random.default_rng(0),
        prompt_length=1,
        max_length=100,
        n_vocab=100,
        stop_ids=stop_ids,
        references=tuple(map(tuple, references)),
    )


def started(drafter: ReferenceDrafter, *references: list[int], **options: frozenset[int]) -> ReferenceDrafter:
    drafter.start(request(*references, **options))
    return drafter


def longest(texts: list[list[int]], context: list[int], order: int) -> int:
    """The longest match that has a continuation, by trying everything; 0 below `order`."""
    best = 0
    for text in texts:
        for end in range(1, len(text)):
            length = 0
            while length < min(end, len(context)) and text[end - 1 - length] == context[-1 - length]:
                length += 1
            best = max(best, length)
    return best if best >= order else 0


@pytest.mark.parametrize("order", [1, 2, 3])
def test_the_longest_match_is_found(order: int) -> None:
    for seed in range(150):
        rng = random.Random(seed)
        texts = [rng.choices(range(6), k=rng.randint(0, 12)) for _ in range(3)]
        context = rng.choices(range(6), k=rng.randint(1, 8))
        corpus = Corpus(texts, order=order)
        end, length = corpus.find(context)
        assert length == longest(texts, context, order)
        if length:
            assert corpus.read(end - length, length) == context[-length:]
            assert corpus.read(end, 1), "a match has something to copy"


def test_of_equal_matches_the_latest_counts_and_nothing_crosses_from_text_to_text() -> None:
    corpus = Corpus([[1, 2, 3], [1, 2, 4], [9, 1, 2]], order=2)
    end, length = corpus.find([7, 1, 2])
    assert (corpus.read(end, 5), length) == ([4], 2)
    assert corpus.find([9, 1, 2]) == (end, 2), "a match at a text's end has nothing to copy"


def test_a_corpus_may_be_empty() -> None:
    nothing: list[list[list[int]]] = [[], [[]], [[1]]]
    for texts in nothing:
        assert Corpus(texts, order=2).find([1, 2, 3]) == (0, 0)


def test_a_reference_is_copied_as_far_as_the_match_is_long() -> None:
    text = [1, 2, 3, 4, 5, 6, 7, 8, 9]
    drafter = started(ReferenceDrafter(max_draft=4), text)
    draft = drafter.propose([50, 1, 2, 3], 10)
    assert (draft.tokens, draft.source, draft.confidence) == ([4, 5, 6], "reference", [3.0, 4.0, 5.0])
    assert drafter.propose([1, 2, 3], 2).tokens == [4, 5]
    assert drafter.propose([1, 2, 3, 4, 5, 6], 10).tokens == [7, 8, 9]
    assert drafter.propose([3], 10).tokens == drafter.propose([5, 4], 10).tokens == []
    assert started(ReferenceDrafter(max_draft=4, bold=True), text).propose([1, 2], 10).tokens == [3, 4, 5, 6]


def test_a_copy_ends_after_a_stop_id() -> None:
    drafter = started(ReferenceDrafter(bold=True), [1, 2, 3, 4, 5], stop_ids=frozenset({4}))
    assert drafter.propose([1, 2], 9).tokens == [3, 4]


def test_references_are_those_of_the_request_and_indexed_once() -> None:
    drafter = started(ReferenceDrafter(), [1, 2, 3])
    corpora = drafter.corpora
    drafter.start(request([1, 2, 3]))
    assert drafter.corpora is corpora
    drafter.start(request([1, 2, 4]))
    assert drafter.propose([1, 2], 9).tokens == [4]
    drafter.start(request())
    assert drafter.propose([1, 2], 9).tokens == []


def test_the_planner_copies_from_references_what_the_text_does_not_hold_and_counts_it_apart() -> None:
    model = FakeLM(n_vocab=500, n_ctx=200)
    plain = [
        token for step in SpeculativeDecoder(Session(model)).generate([1, 2], max_tokens=60) for token in step.tokens
    ]
    costs = Costs(max_rows=8)
    planner = Planner(costs, LookupDrafter(bold=True), None, more=[ReferenceDrafter(bold=True)], fixed=costs)
    decoder = SpeculativeDecoder(Session(model), planner)
    steps = list(decoder.generate([1, 2], max_tokens=60, references=[[2, *plain]]))
    assert [token for step in steps for token in step.tokens] == plain
    assert len(steps) < 20
    assert decoder.stats.drafters["reference"].accepted > 30


def test_references_that_mislead_are_given_up_while_lookup_is_trusted() -> None:
    """Each free drafter has an acceptance of its own."""
    loop = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10] * 30
    costs = Costs(max_rows=8)
    planner = Planner(costs, LookupDrafter(bold=True), None, more=[ReferenceDrafter(bold=True)], fixed=costs)
    # Every pair of the text is in the reference, followed by something else.
    wrong = [token for i in range(10) for token in (loop[i], loop[i + 1], 40 + i)]
    planner.start(request(wrong))
    book = planner._learning
    for n in range(20, 120):
        planner.propose(loop[:n], 7)
    lookup, reference = (book.copies[name].chance(2) for name in ("lookup", "reference"))
    assert reference < 0.1
    assert lookup >= 0.45
    assert book.copies["lookup"].chance(24) > 0.95
