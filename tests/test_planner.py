"""The planner's choices follow costs and chances; what it writes never depends on them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from math import inf
from typing import Any

import pytest

from edge_spec.decoding.decoder import SpeculativeDecoder
from edge_spec.decoding.drafter import Drafter
from edge_spec.decoding.session import Session
from edge_spec.drafting import Costs, LookupDrafter, ModelDrafter, Planner
from edge_spec.drafting.planner import Book
from edge_spec.types import Context, Decoded, Draft, Output, SamplingParams
from tests.fakes import FakeLM


class Clock:
    """A clock that only models move."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class TimedLM(FakeLM):
    """A fake model whose passes take `first_s` and `more_s` for each further token."""

    def __init__(self, clock: Clock, first_s: float, more_s: float, **options: float) -> None:
        super().__init__(**options)  # type: ignore[arg-type]
        self._clock, self._first_s, self._more_s = clock, first_s, more_s

    def decode(self, tokens: Sequence[int], *, rows: int = 1, want: Output = Output.LOGITS) -> Decoded:
        self._clock.now += self._first_s + self._more_s * (len(tokens) - 1)
        return super().decode(tokens, rows=rows, want=want)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("edge_spec.decoding.decoder.perf_counter", clock)
    monkeypatch.setattr("edge_spec.drafting.model.perf_counter", clock)
    return clock


def decoder_of(
    clock: Clock, *, target: tuple[float, float], draft: tuple[float, float], draft_seed: int = 0
) -> SpeculativeDecoder:
    """A target and a draft of these costs; with the same seed (0) the draft is always right."""
    options: dict[str, float] = {"n_vocab": 64, "n_ctx": 400, "max_rows": 16}
    target_model = TimedLM(clock, *target, seed=0, **options)
    draft_model = TimedLM(clock, *draft, seed=draft_seed, **options)
    planner = Planner(
        Costs(max_rows=16),
        LookupDrafter(min_match=10_000),  # the fakes' text repeats, and this is about the model
        ModelDrafter(Session(draft_model)),
        fixed=Costs(max_rows=16),
    )
    return SpeculativeDecoder(Session(target_model), planner)


def lengths(decoder: SpeculativeDecoder) -> list[int]:
    """How much each step drafted, in the second half of a long text."""
    steps = list(decoder.generate([1, 2, 3], max_tokens=300))
    return [step.drafted for step in steps[len(steps) // 2 : -1]]


def test_a_cheap_draft_that_is_right_is_used_to_the_full(clock: Clock) -> None:
    drafted = lengths(decoder_of(clock, target=(0.030, 0.001), draft=(0.002, 0.0002)))
    assert sum(drafted) / len(drafted) > 6


def test_a_draft_that_costs_as_much_as_the_target_is_not_used(clock: Clock) -> None:
    drafted = lengths(decoder_of(clock, target=(0.030, 0.030), draft=(0.030, 0.010)))
    assert sum(drafted) == 0


def test_a_draft_that_is_always_wrong_is_given_up(clock: Clock) -> None:
    drafted = lengths(decoder_of(clock, target=(0.030, 0.010), draft=(0.010, 0.001), draft_seed=7))
    assert sum(drafted) == 0


def test_steep_passes_make_drafts_short(clock: Clock) -> None:
    flat = lengths(decoder_of(clock, target=(0.030, 0.001), draft=(0.004, 0.0004)))
    steep = lengths(decoder_of(clock, target=(0.030, 0.022), draft=(0.004, 0.0004)))
    assert sum(steep) / len(steep) < sum(flat) / len(flat)


def test_a_long_prompt_is_not_read_by_the_draft_for_a_short_answer(clock: Clock) -> None:
    decoder = decoder_of(clock, target=(0.030, 0.010), draft=(0.010, 0.003))
    prompt = [3 + i % 50 for i in range(0, 3 * 350, 3)]
    list(decoder.generate(prompt, max_tokens=4))
    assert "model" not in decoder.stats.drafters


def first_drafted(decoder: SpeculativeDecoder, prompt: list[int], max_tokens: int = 300) -> int:
    """How many tokens were written when the model drafted first."""
    written = 0
    for step in decoder.generate(prompt, max_tokens=max_tokens):
        if step.source == "model":
            return written
        written += len(step.tokens)
    return written


def test_a_longer_prompt_is_read_by_the_draft_for_a_longer_answer(clock: Clock) -> None:
    waits = []
    for length in (10, 40, 80):
        decoder = decoder_of(clock, target=(0.030, 0.005), draft=(0.004, 0.002))  # drafts pay by more than the margin
        list(decoder.generate([1], max_tokens=30, max_draft=0))
        waits.append(first_drafted(decoder, [3 + i % 50 for i in range(0, 3 * length, 3)]))
    assert waits == sorted(set(waits))


def test_no_prompt_is_read_for_drafts_that_are_hardly_faster(clock: Clock) -> None:
    """Where a row costs a third of a pass, one that is expected to be mostly right is hardly faster."""
    prompt = [3 + i % 50 for i in range(0, 3 * 80, 3)]
    for row_s, reads in ((0.005, True), (0.010, False)):
        decoder = decoder_of(clock, target=(0.030, row_s), draft=(0.004, 0.002))
        list(decoder.generate([1], max_tokens=30, max_draft=0))
        assert (first_drafted(decoder, prompt) < 300) == reads


def test_where_answers_are_short_the_draft_reads_later(clock: Clock) -> None:
    waits = []
    for usual in (100, 12):
        decoder = decoder_of(clock, target=(0.030, 0.010), draft=(0.004, 0.002))
        for start in range(16):
            list(decoder.generate([start], max_tokens=usual))
        waits.append(first_drafted(decoder, [3 + i % 50 for i in range(0, 3 * 20, 3)]))
    assert waits[0] < waits[1]


def test_what_the_prompt_took_is_learnt_of_its_unread_tokens(clock: Clock) -> None:
    decoder = decoder_of(clock, target=(0.030, 0.010), draft=(0.010, 0.001))
    prompt = [3 + i % 50 for i in range(0, 3 * 100, 3)]
    for _ in range(2):  # the second time all but one of them is there
        list(decoder.generate(prompt, max_tokens=3, max_draft=0))
    costs = planner_of(decoder).costs
    assert costs.target_s(1) == pytest.approx(0.030)
    assert costs.target_s(8) == pytest.approx(0.030 + 7 * 0.0102, rel=0.01)


def test_a_text_that_can_be_repeated_teaches_nothing_of_its_prompt(clock: Clock) -> None:
    decoder = decoder_of(clock, target=(0.030, 0.010), draft=(0.010, 0.001))
    sampling = SamplingParams(temperature=1.0, seed=1)
    list(decoder.generate(list(range(60)), max_tokens=3, sampling=sampling))
    list(decoder.generate([1, 2], max_tokens=3, max_draft=0))
    assert planner_of(decoder).costs.target_s(8) == pytest.approx(0.030 * (1 + 7 * 0.2), rel=0.01)


def planner_of(decoder: SpeculativeDecoder) -> Planner:
    assert isinstance(decoder._drafter, Planner)
    return decoder._drafter


def lessons_of(decoder: SpeculativeDecoder) -> dict[str, Any]:
    """What its planner learnt, as the next run reads it."""
    return json.loads(json.dumps(planner_of(decoder).to_json()))  # type: ignore[no-any-return]


def drafted_after(clock: Clock, lessons: dict[str, object]) -> list[int]:
    """What a planner with these lessons drafts by step, with a model that is always wrong."""
    clock.now = 0.0  # or differences round otherwise than in another run
    decoder = decoder_of(clock, target=(0.030, 0.006), draft=(0.010, 0.001), draft_seed=7)
    planner_of(decoder).restore(lessons)
    return [step.drafted for step in decoder.generate([1, 2, 3], max_tokens=90)]


def test_the_next_run_knows_what_became_of_drafts(clock: Clock) -> None:
    decoder = decoder_of(clock, target=(0.030, 0.006), draft=(0.010, 0.001), draft_seed=7)
    for _ in range(3):
        list(decoder.generate([1, 2, 3], max_tokens=90))
    lessons = lessons_of(decoder)
    assert sum(drafted_after(clock, lessons)) < sum(drafted_after(clock, {**lessons, "chances": {}}))


def test_the_next_run_knows_how_long_answers_get(clock: Clock) -> None:
    waits = []
    for usual in (100, 12):
        before, decoder = (decoder_of(clock, target=(0.030, 0.010), draft=(0.004, 0.002)) for _ in range(2))
        for start in range(16):
            list(before.generate([start], max_tokens=usual))
        planner_of(decoder).restore({"lengths": lessons_of(before)["lengths"]})
        waits.append(first_drafted(decoder, [3 + i % 50 for i in range(0, 3 * 20, 3)]))
    assert waits[0] < waits[1]


@pytest.mark.parametrize(
    "nonsense",
    [
        {"lengths": "long", "chances": [1]},
        {"lengths": [3, -1], "chances": {"model": {"hits": [1.0], "counts": [1.0], "mean": 0.5}}},
        {"lengths": [0], "chances": {"model": {"hits": [9.0] * 7, "counts": [1.0] * 7, "mean": 0.5}, "lookup": None}},
        {"lengths": [True], "chances": {"model": {"hits": [0.0] * 7, "counts": [0.0] * 7, "mean": 0.5}}},
        {"chances": {"model": {"hits": ["1"] * 7, "counts": [1.0] * 7, "mean": 0.5}, "nobody": {}}},
        {"chances": {"model": {"hits": [inf] * 7, "counts": [inf] * 7, "mean": 0.5}}},
        {"chances": {"model": {"hits": [1.0] * 7, "counts": [4.0] * 7, "mean": 2.0}}},
    ],
)
def test_lessons_that_make_no_sense_change_nothing(nonsense: dict[str, object]) -> None:
    books = []
    for lessons in (nonsense, {}):
        book = Book(Costs(max_rows=16))
        book.restore({"lengths": [7], "chances": {}}, ["lookup"])
        book.restore(lessons, ["lookup"])
        books.append(book.to_json())
    assert books[0] == books[1]


def test_an_answer_counts_once_whenever_lessons_are_kept(clock: Clock) -> None:
    decoder = decoder_of(clock, target=(0.030, 0.006), draft=(0.010, 0.001))
    list(decoder.generate([1, 2, 3], max_tokens=20))
    assert lessons_of(decoder)["lengths"] == lessons_of(decoder)["lengths"] == [20]
    list(decoder.generate([1, 2, 3], max_tokens=30))
    assert lessons_of(decoder)["lengths"] == [20, 30]


class Overconfident(Drafter):
    """As sure as a lookup can be, and always wrong."""

    name = "reference"

    def __init__(self, target: FakeLM) -> None:
        self._target = target

    def propose(self, context: Context, max_tokens: int) -> Draft:
        wrong = (int(self._target.logits_after(list(context)).argmax()) + 1) % self._target.spec.n_vocab
        return Draft([wrong] * max_tokens, source=self.name, confidence=[32.0] * max_tokens)


@pytest.mark.parametrize("answer", [8, 20, 60, 240])
@pytest.mark.parametrize("prompt", [3, 100])
def test_no_answer_gets_much_slower_than_plain_decoding_whatever_was_expected(
    clock: Clock, answer: int, prompt: int
) -> None:
    """Copies and a model that are all wrong: a twentieth and a pass are lost, and .15 if the model read."""
    plain_s, row_s = 0.030, 0.006  # as is guessed before it is measured
    target = TimedLM(clock, plain_s, row_s, n_vocab=64, n_ctx=400, max_rows=16)
    model = ModelDrafter(Session(TimedLM(clock, 0.009, 0.002, n_vocab=64, n_ctx=400, max_rows=16, seed=7)))
    costs = Costs(max_rows=16)
    more = [Overconfident(target)]
    planner = Planner(costs, LookupDrafter(min_match=10_000), model, more=more, fixed=costs, max_draft=15)
    decoder = SpeculativeDecoder(Session(target), planner)
    steps = decoder.generate([3 + i % 50 for i in range(0, 3 * prompt, 3)], max_tokens=answer)
    next(steps)
    before = clock.now
    written = sum(len(step.tokens) for step in steps)
    assert written == answer - 1
    assert clock.now - before < plain_s * (written * (1 + 0.05 + 0.15) + 0.3 + 0.5)


def test_the_first_token_waits_for_no_draft_model(clock: Clock) -> None:
    decoder = decoder_of(clock, target=(0.030, 0.001), draft=(0.002, 0.0002))
    for start in range(8):  # answers here are long: the prompt is read for one
        list(decoder.generate([start], max_tokens=250))
    first, *later = decoder.generate([3 + i % 50 for i in range(0, 3 * 100, 3)], max_tokens=250)
    assert first.source == "none"
    assert decoder.stats.prefill_s == pytest.approx(0.030 + 99 * 0.001)  # the target alone
    assert sum(step.source == "model" for step in later) > len(later) / 2


def test_a_free_row_is_never_left_empty(clock: Clock) -> None:
    """Where a pass of one row is padded to two, a guess by one matching token costs nothing."""
    costs = Costs(max_rows=8, alignment=2)
    planner = Planner(costs, LookupDrafter(max_draft=7, bold=True, min_match=1), None, fixed=costs)
    decoder = SpeculativeDecoder(Session(FakeLM(n_vocab=16)), planner)
    steps = list(decoder.generate([1, 2, 1], max_tokens=1 + 40))
    guessed = [step for step in steps if step.drafted]
    assert len(guessed) > len(steps) / 2


# ---- laws


def test_a_seed_gives_the_same_text_whatever_the_clock_says(clock: Clock) -> None:
    sampling = SamplingParams(temperature=0.8, seed=3)
    texts = []
    for target_s, draft_s in ((0.030, 0.002), (0.030, 0.060), (0.001, 0.060)):
        decoder = decoder_of(clock, target=(target_s, 0.001), draft=(draft_s, 0.001), draft_seed=1)
        list(decoder.generate([1, 2, 3], max_tokens=60))  # what it learns here must not matter
        steps = list(decoder.generate([1, 2, 3], max_tokens=60, sampling=sampling))
        texts.append([token for step in steps for token in step.tokens])
    assert all(one == other for one, other in pairwise(texts))


def test_the_pace_is_the_planners_own_business() -> None:
    """A model drafter that was planned and is then used alone drafts its fixed length again."""
    model = ModelDrafter(Session(FakeLM()), draft_tokens=4)
    planner = Planner(Costs(max_rows=8), LookupDrafter(), model, fixed=Costs(max_rows=8))
    decoder = SpeculativeDecoder(Session(FakeLM()), planner)
    list(decoder.generate([1], max_tokens=5))
    assert model.pace is planner
    alone = SpeculativeDecoder(Session(FakeLM()), model)
    steps = list(alone.generate([1], max_tokens=20))
    assert [step.drafted for step in steps[:-1]] == [4] * (len(steps) - 1)


def test_closing_the_planner_closes_the_model() -> None:
    draft = FakeLM()
    Planner(Costs(max_rows=8), LookupDrafter(), ModelDrafter(Session(draft)), fixed=Costs(max_rows=8)).close()
    assert draft.closed
