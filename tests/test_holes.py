"""Contexts that have lost tokens: a cache serves one with the same holes only, and drafts change nothing."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from zlib import crc32

import numpy as np
import pytest

from edge_spec.backends.top_k import top_k
from edge_spec.context import Sinks, Stretch, read_on
from edge_spec.decoding import Drafter, NoDrafter, Session, SpeculativeDecoder
from edge_spec.decoding.holes import unfold
from edge_spec.drafting import LookupDrafter, ModelDrafter
from edge_spec.errors import ContextLengthError
from edge_spec.types import Context, Decoded, Draft, FinishReason, Hole, Logits, Output, SamplingParams
from tests.fakes import FakeLM


class SeeingLM(FakeLM):
    """Each cached row stands for all that it saw, and logits come from what the last row saw: any false row shows."""

    def __init__(self, *, n_vocab: int = 16, n_ctx: int = 64, can_evict: bool = True, seed: int = 0) -> None:
        super().__init__(n_vocab, n_ctx, can_evict=can_evict, seed=seed, order=None)
        self.rows: list[int] = []

    def decode(self, tokens: Sequence[int], *, rows: int = 1, want: Output = Output.LOGITS) -> Decoded:
        before = list(self.rows)
        super().decode(tokens, rows=rows)
        self.rows = before
        for token in tokens:
            self.rows.append(crc32(repr((token, self.rows)).encode()))
        seen = [self._logits_of(self.rows[len(self.rows) - rows + i]) for i in range(rows)]
        logits = np.array(seen, np.float32).reshape(rows, self.spec.n_vocab)
        return Decoded(logits) if want is Output.LOGITS else Decoded(logits[:0], top_k(logits))

    @property
    def per_token(self) -> list[int]:
        return self.rows

    def rollback(self, length: int) -> None:
        super().rollback(length)
        del self.rows[length:]

    def evict(self, start: int, end: int) -> None:
        super().evict(start, end)
        del self.rows[start:end]

    def _logits_of(self, row: int) -> Logits:
        rng = np.random.default_rng([self.seed, row])
        logits: Logits = rng.standard_normal(self.spec.n_vocab).astype(np.float32)
        return logits


def fresh(context: Context, holes: Sequence[Hole]) -> Logits:
    """The logits behind a context that is read as it came about."""
    model = SeeingLM(n_ctx=512)
    for hole, stage in zip(holes, unfold(list(context), holes), strict=False):
        known = len(model.tokens)
        assert model.tokens == stage[:known]
        model.decode(stage[known:], rows=0)
        model.evict(hole.start, hole.end)
    logits: Logits = model.decode(list(context)[len(model.tokens) :]).logits[0]
    return logits


# The session


@pytest.mark.parametrize("seed", range(6))
def test_logits_are_those_of_the_named_context_and_its_holes_whatever_came_before(seed: int) -> None:
    rng = np.random.default_rng(seed)
    session = Session(SeeingLM())
    kept: list[Stretch] = [Stretch([1, 2, 3])]
    for _ in range(60):
        context = kept[rng.integers(len(kept))]
        new = rng.integers(0, 16, rng.integers(1, 12)).tolist()
        context = read_on(context, new, 40, Sinks(sinks=int(rng.integers(0, 5)), low=0.6))
        logits = session.decode(context.ids, holes=context.holes, chunk=int(rng.integers(1, 9))).logits[0]
        np.testing.assert_array_equal(logits, fresh(context.ids, context.holes))
        kept = [*kept[-3:], context]


def test_a_hole_costs_no_reading_where_its_tokens_are_cached() -> None:
    model = SeeingLM()
    session = Session(model)
    session.decode(list(range(10)))
    hole = Hole(2, (2, 3, 4), 6)
    assert session.count_unread([0, 1, 5, 6, 7, 8, 9, 11], [hole]) == 2
    session.decode([0, 1, 5, 6, 7, 8, 9, 11], holes=[hole])
    assert model.evictions == [(2, 5)]
    assert [call.tokens for call in model.calls[1:]] == [(9, 11)], "9 came before the eviction the first time"
    session.decode([0, 1, 5, 6, 7, 8, 9, 11, 12], holes=[hole])
    assert [call.tokens for call in model.calls[2:]] == [(12,)]


def test_a_cache_with_holes_serves_no_context_without_them() -> None:
    model = SeeingLM()
    session = Session(model)
    session.decode(list(range(10)))
    session.decode([0, 1, 5, 6, 7, 8, 9], holes=[Hole(2, (2, 3, 4), 6)])
    logits = session.decode([0, 1, 5, 6, 7]).logits[0]
    np.testing.assert_array_equal(logits, fresh([0, 1, 5, 6, 7], []))
    assert model.calls[-1].tokens == (5, 6, 7), "what stood before the hole serves"


def test_where_the_backend_cannot_evict_what_is_left_is_read_again() -> None:
    model = SeeingLM(can_evict=False)
    session = Session(model)
    session.decode(list(range(10)))
    logits = session.decode([0, 1, 5, 6, 7, 8, 9], holes=[Hole(2, (2, 3, 4), 6)]).logits[0]
    np.testing.assert_array_equal(logits, fresh([0, 1, 5, 6, 7, 8, 9], []))
    assert model.calls[-1].tokens == (5, 6, 7, 8, 9)


def test_a_draft_reads_nothing_for_the_sake_of_a_hole() -> None:
    model = SeeingLM()
    session = Session(model, exact=False)
    hole = Hole(2, (2, 3, 4), 6)
    assert session.count_unread([0, 1, 5, 6, 7, 8], [hole]) == 6
    session.decode([0, 1, 5, 6, 7, 8], holes=[hole])
    assert [call.tokens for call in model.calls] == [(0, 1, 5, 6, 7, 8)]
    assert not model.evictions
    later = Hole(2, (5, 6), 4)
    session.decode([0, 1, 7, 8, 9], holes=[hole, later])
    assert model.evictions == [(2, 4)], "what it has read it can lose"
    assert model.calls[-1].tokens == (9,)


def test_trimming_keeps_what_serves_and_reads_nothing() -> None:
    model = SeeingLM()
    session = Session(model)
    session.decode(list(range(10)))
    assert session.trim([0, 1, 2, 9]) == 3
    assert model.tokens == [0, 1, 2]
    assert len(model.calls) == 1


# The loop


class Guesses(Drafter):
    """Drafts what a plain run wrote, with an error now and then."""

    name = "guesses"

    def __init__(self, written: list[int], prompt: int) -> None:
        self.written, self.position, self.lost = written, -prompt, 0

    def evict(self, context: Context, hole: Hole) -> None:
        self.lost += len(hole.tokens)

    def propose(self, context: Context, max_tokens: int) -> Draft:
        done = self.position + len(context) + self.lost
        tokens = self.written[done : done + min(max_tokens, 5)]
        return Draft([t if (done + i) % 7 else (t + 1) % 16 for i, t in enumerate(tokens)], source=self.name)


def write(drafter: Drafter, *, can_evict: bool = True, n_ctx: int = 32, seed: int = 0) -> SpeculativeDecoder:
    model = SeeingLM(n_ctx=n_ctx, can_evict=can_evict, seed=seed)
    decoder = SpeculativeDecoder(Session(model), drafter)
    decoder.written = []  # type: ignore[attr-defined]
    for step in decoder.generate([1, 2, 3, 4, 5], max_tokens=120, eviction=Sinks(low=0.7)):
        decoder.written += step.tokens  # type: ignore[attr-defined]
        assert len(model.tokens) <= n_ctx
        decoder.reason = step.finish_reason  # type: ignore[attr-defined]
    return decoder


@pytest.mark.parametrize("can_evict", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_greedy_text_with_sinks_is_the_same_whatever_drafts(seed: int, can_evict: bool) -> None:
    plain = write(NoDrafter(), seed=seed, can_evict=can_evict)
    written = plain.written  # type: ignore[attr-defined]
    assert len(written) == 120
    assert plain.reason is FinishReason.LENGTH  # type: ignore[attr-defined]
    assert len(plain.stats.holes) > 5
    draft = ModelDrafter(Session(SeeingLM(n_ctx=32, seed=seed), exact=False))
    for drafter in (Guesses(written, 5), LookupDrafter(), draft):
        other = write(drafter, seed=seed, can_evict=can_evict)
        assert other.written == written, drafter.name  # type: ignore[attr-defined]
        assert other.stats.holes == plain.stats.holes
        if not isinstance(drafter, LookupDrafter):
            assert other.stats.accepted > 20, drafter.name


def test_a_self_draft_with_sinks_still_accepts_everything() -> None:
    decoder = write(ModelDrafter(Session(SeeingLM(n_ctx=32), exact=False)))
    assert decoder.stats.accepted == decoder.stats.drafted > 60


def test_without_a_policy_a_full_window_ends_the_text() -> None:
    decoder = SpeculativeDecoder(Session(SeeingLM(n_ctx=32)))
    *_, last = decoder.generate([1, 2, 3])
    assert last.finish_reason is FinishReason.CONTEXT_FULL
    assert not decoder.prune(10)


def test_pruning_on_demand_evicts_before_the_next_step() -> None:
    decoder = SpeculativeDecoder(Session(SeeingLM(n_ctx=64)))
    steps = decoder.generate(list(range(12)), max_tokens=20, eviction=Sinks())
    for _ in range(4):
        next(steps)
    assert decoder.prune(9)
    next(steps)
    (hole,) = decoder.stats.holes
    assert (hole.start, len(hole.tokens)) == (2, 16 - 9)
    assert sum(1 for _ in steps) == 15, "max_tokens counts what was written, evicted or not"


def test_penalties_go_on_counting_what_was_evicted() -> None:
    model = FakeLM(n_vocab=8, n_ctx=32, order=1)
    decoder = SpeculativeDecoder(Session(model))
    sampling = SamplingParams(frequency_penalty=50)
    tokens = [t for s in decoder.generate([1], max_tokens=80, eviction=Sinks(), sampling=sampling) for t in s.tokens]
    assert decoder.stats.holes
    counts = np.bincount(tokens, minlength=8)
    assert counts.max() - counts.min() <= 1


# The policy


@pytest.mark.parametrize(
    ("sinks", "length", "n_ctx", "expected"),
    [(4, 100, 100, (4, 29)), (40, 100, 100, (18, 43)), (4, 75, 100, None), (0, 100, 100, (0, 25))],
)
def test_sinks_and_recent_tokens_stay(sinks: int, length: int, n_ctx: int, expected: tuple[int, int] | None) -> None:
    assert Sinks(sinks).span(length, n_ctx) == expected


@pytest.mark.parametrize("n_new", [1, 30, 99, 100, 101, 250, 1000])
@pytest.mark.parametrize("n_before", [0, 1, 50, 99])
def test_what_is_read_never_outgrows_the_window_and_ends_with_the_newest(n_before: int, n_new: int) -> None:
    before, new = list(range(n_before)), list(range(5000, 5000 + n_new))
    context = read_on(Stretch(before), new, 100, Sinks())
    stages = unfold(context.ids, context.holes)
    assert max(map(len, stages)) <= 100
    assert len(context.ids) < 100
    assert context.ids[-1] == new[-1]
    everything = before + new
    if len(everything) >= 100:
        assert context.ids[:4] == everything[:4]
        assert len(context.ids) >= 40
    assert len(context.ids) + sum(len(hole.tokens) for hole in context.holes) == len(everything)
    assert all(one.start <= two.start for one, two in pairwise(context.holes))
    assert not context.holes or context.holes[-1].read < len(context.ids)


def test_a_window_without_a_middle_is_refused() -> None:
    with pytest.raises(ContextLengthError):
        read_on(Stretch([]), list(range(20)), 8, Sinks())
