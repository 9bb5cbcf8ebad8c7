"""The laws of `CausalLM`, one suite for every backend.

A backend's test file subclasses `CausalLMContract`, or `EqualRowsContract`, and overrides the fixture `make_model`:

    class TestFake(CausalLMContract):
        @pytest.fixture
        def make_model(self) -> MakeModel:
            return lambda n_ctx: FakeLM(n_ctx=n_ctx)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import ClassVar, TypeAlias

import numpy as np
import pytest

from edge_spec.backends.base import CausalLM, Parked
from edge_spec.errors import (
    CacheUnsupportedError,
    ContextLengthError,
    EdgeSpecError,
    RollbackUnsupportedError,
    UsageError,
)
from edge_spec.types import TOP_K, Logits, Output

MakeModel: TypeAlias = Callable[[int], CausalLM]
"""Loads the model with a cache of so many tokens; always the same model."""

N_CTX = 64


class CausalLMContract:
    """Every test method is a law. Class attributes say what a backend is allowed to differ in."""

    atol: ClassVar[float] = 1e-4
    """How far a logit may move from pass to pass where `row_alignment` is None (and no argmax may change)."""
    misuse: ClassVar[type[Exception]] = UsageError
    """What an argument out of range raises."""
    resize_keeps: ClassVar[int] = N_CTX
    """Tokens from the end that can be rolled back over behind a change of the cache's length."""

    traceless: ClassVar[int] = 1
    """Tokens whose rollback leaves no trace: to a multiple of so many."""

    @pytest.fixture
    def make_model(self) -> MakeModel:
        """Override: the way to load a model."""
        raise NotImplementedError

    @pytest.fixture
    def open_model(self, make_model: MakeModel) -> Iterator[MakeModel]:
        """`make_model`, with every model closed at the end."""
        opened: list[CausalLM] = []

        def open_one(n_ctx: int) -> CausalLM:
            opened.append(make_model(n_ctx))
            return opened[-1]

        yield open_one
        for model in opened:
            model.close()

    @pytest.fixture
    def model(self, open_model: MakeModel) -> CausalLM:
        """An empty model with a cache of `N_CTX` tokens."""
        return open_model(N_CTX)

    def assert_same(self, model: CausalLM, left: Logits, right: Logits) -> None:
        """Equal as far as the model promises: to the bit, or nearly with the same argmax."""
        atol = self.atol if model.spec.row_alignment is None else 0
        np.testing.assert_allclose(left, right, rtol=0, atol=atol)
        assert np.array_equal(left.argmax(-1), right.argmax(-1))

    # What a model says of itself

    def test_the_spec_is_of_the_cache_that_was_asked_for(self, model: CausalLM) -> None:
        spec = model.spec
        assert spec.n_ctx == N_CTX
        assert spec.n_ctx_train >= N_CTX
        assert min(spec.n_vocab, spec.n_layer, spec.n_kv_heads, spec.head_dim, spec.max_rows) >= 1
        assert spec.kv_bytes_per_token >= 1
        assert spec.row_alignment is None or spec.row_alignment >= 1
        assert model.length == 0

    # Decoding

    def test_decode_appends(self, model: CausalLM) -> None:
        model.decode(draw(model, 5))
        assert model.length == 5
        model.decode(draw(model, 1))
        assert model.length == 6

    @pytest.mark.parametrize("rows", [0, 1, 2, 5])
    def test_logits_have_one_row_for_each_position_asked_for(self, model: CausalLM, rows: int) -> None:
        logits = model.decode(draw(model, 7), rows=rows).logits
        assert logits.shape == (rows, model.spec.n_vocab)
        assert logits.dtype == np.float32
        assert np.isfinite(logits).all()

    def test_max_rows_rows_can_be_had(self, model: CausalLM) -> None:
        rows = min(model.spec.max_rows, N_CTX)
        assert model.decode(draw(model, rows), rows=rows).logits.shape[0] == rows

    def test_rows_are_the_last_positions_in_order(self, model: CausalLM) -> None:
        tokens = draw(model, 9)
        rows = model.decode(tokens, rows=4).logits.copy()
        for row, end in zip(rows, range(6, 10), strict=True):
            self.assert_same(model, row[None], read(model, tokens[:end]))

    def test_the_next_token_depends_on_the_whole_context(self, model: CausalLM) -> None:
        tokens = draw(model, 12)
        first, *rest = tokens
        other = [(first + 1) % model.spec.n_vocab, *rest]
        assert not np.array_equal(read(model, tokens), read(model, other))
        assert not np.array_equal(read(model, tokens), read(model, tokens[1:]))

    @pytest.mark.parametrize("width", [1, 2, 3, 7, 20])
    def test_reading_in_chunks_equals_reading_at_once(self, model: CausalLM, width: int) -> None:
        tokens = draw(model, 30)
        whole = read(model, tokens)
        model.rollback(0)
        for start in range(0, 30, width):
            last = model.decode(tokens[start : start + width]).logits.copy()
        self.assert_same(model, last, whole)

    def test_any_sequence_of_integers_will_do(self, model: CausalLM) -> None:
        tokens = draw(model, 6)
        expected = read(model, tokens)
        for other in (tuple(tokens), np.array(tokens), np.array(tokens, np.int32)):
            model.rollback(0)
            self.assert_same(model, model.decode(other).logits, expected)  # type: ignore[arg-type]

    # The likeliest tokens alone

    @pytest.mark.parametrize("rows", [0, 1, 3])
    def test_the_top_k_are_the_largest_logits(self, model: CausalLM, rows: int) -> None:
        tokens, k = draw(model, 9), min(TOP_K, model.spec.n_vocab)
        logits = model.decode(tokens, rows=rows).logits.copy()
        model.rollback(0)
        decoded = model.decode(tokens, rows=rows, want=Output.TOP_K)
        top = decoded.top
        assert top is not None
        assert decoded.logits.shape == (0, model.spec.n_vocab)
        assert top.ids.shape == top.logits.shape == (rows, k)
        assert top.log_sum.shape == (rows,)
        assert np.array_equal(top.logits, -np.sort(-logits, axis=1)[:, :k])
        assert np.array_equal(np.take_along_axis(logits, top.ids, axis=1), top.logits)
        assert all(len(set(ids)) == k for ids in top.ids)

    def test_the_mass_of_the_top_k_is_of_all_logits(self, model: CausalLM) -> None:
        tokens = draw(model, 9)
        logits = read(model, tokens)[0].astype(np.float64)
        model.rollback(0)
        top = model.decode(tokens, want=Output.TOP_K).top
        assert top is not None
        np.testing.assert_allclose(top.log_sum[0], np.log(np.exp(logits).sum()), rtol=1e-5)

    # Rolling back

    @pytest.mark.parametrize("kept", [0, 1, 2, 7, 19])
    def test_rollback_then_decode_equals_a_fresh_read(self, model: CausalLM, kept: int) -> None:
        tokens, wrong = draw(model, 20), draw(model, 20, seed=1)
        fresh = read(model, tokens)
        model.rollback(0)
        model.decode(tokens[:kept] + wrong[kept:])
        model.rollback(kept)
        assert model.length == kept
        self.assert_same(model, model.decode(tokens[kept:]).logits, fresh)

    def test_rollback_to_the_length_changes_nothing(self, model: CausalLM) -> None:
        tokens = draw(model, 8)
        uninterrupted = read(model, tokens)
        model.rollback(0)
        model.decode(tokens[:7])
        model.rollback(7)
        assert model.length == 7
        self.assert_same(model, model.decode(tokens[7:]).logits, uninterrupted)

    def test_rollback_of_an_empty_cache_to_0_is_allowed(self, model: CausalLM) -> None:
        model.rollback(0)
        assert model.length == 0

    @pytest.mark.parametrize("length", [-1, 6, 1000])
    def test_rollback_out_of_range_is_refused(self, model: CausalLM, length: int) -> None:
        model.decode(draw(model, 5))
        with pytest.raises(self.misuse):
            model.rollback(length)
        assert model.length == 5

    def test_speculation_leaves_no_trace(self, model: CausalLM) -> None:
        """Drafts that are rejected, over and over, at every length: what follows is as if they had never been."""
        tokens, wrong = draw(model, 24), draw(model, 24, seed=2)
        plain = read(model, tokens)
        model.rollback(0)
        for position in range(24):
            width = 1 + position % 4
            model.decode(tokens[position : position + 1] + wrong[:width], rows=min(width, model.spec.max_rows))
            model.rollback(position + 1)
        model.rollback(23)
        self.assert_same(model, model.decode(tokens[23:]).logits, plain)

    # The window

    def test_the_window_can_be_filled_to_the_last_token(self, model: CausalLM) -> None:
        model.decode(draw(model, N_CTX - 1))
        model.decode(draw(model, 1))
        assert model.length == N_CTX

    @pytest.mark.parametrize(("cached", "added"), [(0, N_CTX + 1), (10, N_CTX - 9), (N_CTX, 1), (10, 5000)])
    def test_what_does_not_fit_is_refused_before_anything_is_cached(
        self, model: CausalLM, cached: int, added: int
    ) -> None:
        tokens = draw(model, N_CTX)
        if cached:
            model.decode(tokens[:cached])
        with pytest.raises(ContextLengthError) as caught:
            model.decode(draw(model, added))
        assert (caught.value.needed, caught.value.n_ctx) == (cached + added, N_CTX)
        assert model.length == cached
        if 0 < cached < N_CTX:
            going_on = model.decode(tokens[cached : cached + 1]).logits.copy()
            self.assert_same(model, going_on, read(model, tokens[: cached + 1]))

    # Dropping tokens from the middle

    @pytest.mark.parametrize(("start", "end"), [(0, 1), (0, 7), (5, 6), (4, 15), (1, 29)])
    def test_evict_shortens_the_cache_and_decoding_goes_on(self, model: CausalLM, start: int, end: int) -> None:
        tokens = draw(model, 34)
        model.decode(tokens[:30])
        if not model.spec.can_evict:
            with pytest.raises(CacheUnsupportedError):
                model.evict(start, end)
            assert model.length == 30
            return
        model.evict(start, end)
        assert model.length == 30 - (end - start)
        logits = model.decode(tokens[30:], rows=4).logits
        assert model.length == 34 - (end - start)
        assert np.isfinite(logits).all()

    @pytest.mark.parametrize("start", [0, 1, 13, 20])
    def test_evicting_the_end_is_rolling_back(self, model: CausalLM, start: int) -> None:
        if not model.spec.can_evict:
            pytest.skip("the cache cannot evict")
        tokens, more = draw(model, 20), draw(model, 3, seed=1)
        expected = read(model, tokens[:start] + more)
        model.rollback(0)
        model.decode(tokens)
        model.evict(start, 20)
        self.assert_same(model, model.decode(more).logits, expected)

    def test_evicting_nothing_changes_nothing(self, model: CausalLM) -> None:
        if not model.spec.can_evict:
            pytest.skip("the cache cannot evict")
        tokens = draw(model, 12)
        expected = read(model, tokens)
        model.rollback(0)
        model.decode(tokens[:9])
        for place in (0, 4, 9):
            model.evict(place, place)
        self.assert_same(model, model.decode(tokens[9:]).logits, expected)

    def test_rolling_back_behind_an_eviction_leaves_no_trace(self, model: CausalLM) -> None:
        if not model.spec.can_evict:
            pytest.skip("the cache cannot evict")
        tokens, wrong = draw(model, 30), draw(model, 9, seed=1)
        model.decode(tokens[:20])
        model.evict(3, 8)
        expected = model.decode(tokens[20:24]).logits.copy()
        for kept, width in ((15, 9), (17, 1), (18, 3)):
            model.rollback(kept)
            model.decode(wrong[:width])
            model.rollback(kept)
            self.assert_same(model, model.decode(tokens[kept + 5 : 24]).logits, expected)

    def test_rolling_back_before_an_eviction_restores_what_was_read_there(self, model: CausalLM) -> None:
        if not model.spec.can_evict:
            pytest.skip("the cache cannot evict")
        tokens = draw(model, 25)
        expected = read(model, tokens)
        model.evict(12, 16)
        model.rollback(12)
        self.assert_same(model, model.decode(tokens[12:]).logits, expected)

    def test_what_is_evicted_makes_room(self, model: CausalLM) -> None:
        if not model.spec.can_evict:
            pytest.skip("the cache cannot evict")
        model.decode(draw(model, N_CTX))
        for _ in range(5):
            model.evict(4, 24)
            assert np.isfinite(model.decode(draw(model, 20)).logits).all()
        assert model.length == N_CTX

    @pytest.mark.parametrize(("start", "end"), [(-1, 2), (3, 2), (0, 6), (6, 6)])
    def test_evicting_what_is_not_there_is_refused(self, model: CausalLM, start: int, end: int) -> None:
        if not model.spec.can_evict:
            pytest.skip("the cache cannot evict")
        model.decode(draw(model, 5))
        with pytest.raises(self.misuse):
            model.evict(start, end)
        assert model.length == 5

    # Changing the length of the cache

    @pytest.mark.parametrize("n_ctx", [20, 40, N_CTX, 2 * N_CTX])
    def test_a_resized_cache_keeps_its_tokens(self, model: CausalLM, n_ctx: int) -> None:
        tokens = draw(model, 24)
        expected = read(model, tokens)
        model.rollback(0)
        model.decode(tokens[:20])
        if not model.spec.can_resize:
            with pytest.raises(CacheUnsupportedError):
                model.resize(n_ctx)
            return
        model.resize(n_ctx)
        assert (model.spec.n_ctx, model.length) == (n_ctx, 20)
        if n_ctx == 20:
            with pytest.raises(ContextLengthError):
                model.decode(tokens[20:])
            model.resize(30)
        self.assert_same(model, model.decode(tokens[20:]).logits, expected)

    def test_a_resized_cache_can_be_filled_to_its_last_token(self, model: CausalLM) -> None:
        if not model.spec.can_resize:
            pytest.skip("the cache cannot be resized")
        model.decode(draw(model, 10))
        for n_ctx in (16, 2 * N_CTX):
            model.resize(n_ctx)
            model.decode(draw(model, n_ctx - model.length))
            with pytest.raises(ContextLengthError):
                model.decode([1])

    def test_a_resized_cache_is_as_one_of_that_length(self, model: CausalLM, open_model: MakeModel) -> None:
        if not model.spec.can_resize:
            pytest.skip("the cache cannot be resized")
        tokens = draw(model, 40)
        read(model, tokens[:12])
        model.resize(N_CTX // 2)
        model.resize(N_CTX)
        if self.resize_keeps < 7:
            with pytest.raises(RollbackUnsupportedError):
                model.rollback(5)
            assert model.length == 12
            model.rollback(0)
            model.decode(tokens[:5])
        else:
            model.rollback(5)
        self.assert_same(model, model.decode(tokens[5:]).logits, read(open_model(N_CTX), tokens))

    def test_evict_and_resize_go_together(self, model: CausalLM) -> None:
        if not (model.spec.can_evict and model.spec.can_resize):
            pytest.skip("the cache cannot do both")
        tokens = draw(model, 34)
        model.decode(tokens[:30])
        model.evict(2, 12)
        expected = model.decode(tokens[30:]).logits.copy()
        model.rollback(0)
        model.decode(tokens[:30])
        model.evict(2, 12)
        model.resize(24)
        self.assert_same(model, model.decode(tokens[30:]).logits, expected)

    @pytest.mark.parametrize("n_ctx", [-1, 0, 9, 10**9])
    def test_a_length_that_does_not_do_is_refused(self, model: CausalLM, n_ctx: int) -> None:
        if not model.spec.can_resize:
            pytest.skip("the cache cannot be resized")
        tokens = draw(model, 11)
        expected = read(model, tokens)
        model.rollback(10)
        with pytest.raises(self.misuse):
            model.resize(n_ctx)
        assert (model.spec.n_ctx, model.length) == (N_CTX, 10)
        self.assert_same(model, model.decode(tokens[10:]).logits, expected)

    # Setting sequences aside

    def park(self, model: CausalLM) -> Parked:
        """What is cached, set aside; skips where that cannot be."""
        if not model.spec.can_park:
            with pytest.raises(CacheUnsupportedError):
                model.park()
            pytest.skip("the cache cannot set sequences aside")
        return model.park()

    @pytest.mark.parametrize("length", [1, 20, 32, 50])
    def test_a_resumed_sequence_is_to_the_bit_as_if_it_had_never_left(self, model: CausalLM, length: int) -> None:
        tokens, other = draw(model, length + 4), draw(model, 60, seed=1)
        read(model, tokens[:length])
        expected = model.decode(tokens[length:], rows=4).logits.copy()
        read(model, tokens[:length])
        parked = self.park(model)
        assert (parked.length, model.length) == (length, length)
        read(model, other)
        model.resume(parked)
        assert model.length == length
        assert np.array_equal(model.decode(tokens[length:], rows=4).logits, expected)

    @pytest.mark.parametrize("shared", [0, 5, 32, 45])
    def test_two_sequences_that_begin_alike_do_not_disturb_each_other(self, model: CausalLM, shared: int) -> None:
        """They take turns, each some tokens at a time, through drafts that are rejected."""
        if shared % self.traceless:
            pytest.skip("a rollback leaves a trace, parked or not")
        one = draw(model, 60)
        two = one[:shared] + draw(model, 60, seed=1)[shared:]
        wrong = draw(model, 3, seed=2)

        def go_on(sequence: list[int], start: int) -> Logits:
            model.decode(wrong)
            model.rollback(model.length - 3)
            return model.decode(sequence[start : start + 4], rows=4).logits.copy()

        def begin(sequence: list[int]) -> None:
            model.rollback(shared)
            model.decode(sequence[shared:48], rows=0)

        model.decode(one[:48], rows=0)
        alone = []
        for sequence in (one, two):
            begin(sequence)
            alone.append([go_on(sequence, start) for start in (48, 52, 56)])
        begin(one)
        parked = self.park(model)
        begin(two)
        parked = model.swap(parked)
        for turn, start in enumerate((48, 52, 56)):
            assert np.array_equal(go_on(one, start), alone[0][turn])
            parked = model.swap(parked)
            assert np.array_equal(go_on(two, start), alone[1][turn])
            if turn < 2:
                parked = model.swap(parked)

    def test_what_is_done_to_the_cache_does_not_change_what_is_parked(self, model: CausalLM) -> None:
        tokens, other = draw(model, 44), draw(model, 60, seed=1)
        read(model, tokens[:40])
        expected = model.decode(tokens[40:], rows=4).logits.copy()
        read(model, tokens[:40])
        parked = self.park(model)
        if model.spec.can_evict:
            model.evict(3, 13)
            model.decode(other[:9])
            model.evict(0, 20)
        if model.spec.can_resize:
            model.resize(40)
            model.resize(2 * N_CTX)
        model.decode(other[:3])
        if self.resize_keeps >= N_CTX:
            model.rollback(5)
            model.decode(other[3:20])
        model.resume(parked)
        assert model.length == 40
        assert np.array_equal(model.decode(tokens[40:], rows=4).logits, expected)

    def test_an_eviction_is_parked_too(self, model: CausalLM) -> None:
        if not model.spec.can_evict:
            pytest.skip("the cache cannot evict")
        tokens = draw(model, 44)

        def evicted() -> None:
            read(model, tokens[:40])
            model.evict(3, 13)

        evicted()
        expected = model.decode(tokens[40:], rows=4).logits.copy()
        evicted()
        parked = self.park(model)
        read(model, draw(model, 50, seed=1))
        model.resume(parked)
        assert model.length == 30
        self.assert_same(model, model.decode(tokens[40:], rows=4).logits, expected)

    def test_a_resumed_sequence_can_be_rolled_back_evicted_and_resized(self, model: CausalLM) -> None:
        tokens, other = draw(model, 44), draw(model, 30, seed=1)

        def go_on() -> Logits:
            if model.spec.can_evict:
                model.evict(2, 7)
            if model.spec.can_resize:
                model.resize(50)
            if self.resize_keeps >= N_CTX:
                model.rollback(model.length - 3)
            logits = model.decode(tokens[40:], rows=4).logits.copy()
            if model.spec.can_resize:
                model.resize(N_CTX)
            return logits

        read(model, tokens[:40])
        expected = go_on()
        read(model, tokens[:40])
        parked, again = self.park(model), model.park()
        read(model, other)
        for sequence in (parked, again):
            model.resume(sequence)
            self.assert_same(model, go_on(), expected)

    def test_a_parked_sequence_counts_until_it_is_freed_or_resumed(self, model: CausalLM) -> None:
        assert model.park_bytes >= 0
        read(model, draw(model, 50))
        parked, again = self.park(model), model.park()
        read(model, draw(model, 3, seed=1))
        each = model.spec.kv_bytes_per_token
        assert parked.n_bytes + again.n_bytes >= 50 * each
        model.resume(again)
        again.free()
        assert again.n_bytes == 0
        model.rollback(0)
        assert parked.n_bytes >= 50 * each
        parked.free()
        parked.free()
        assert parked.n_bytes == 0
        for gone in (parked, again):
            for call in (model.resume, model.swap):
                with pytest.raises(self.misuse):
                    call(gone)
        assert model.length == 0

    def test_an_empty_cache_can_be_parked(self, model: CausalLM) -> None:
        tokens = draw(model, 12)
        expected = read(model, tokens)
        model.rollback(0)
        empty = self.park(model)
        model.decode(tokens[:7])
        full = model.swap(empty)
        assert model.length == 0
        self.assert_same(model, model.decode(tokens).logits, expected)
        model.resume(full)
        self.assert_same(model, model.decode(tokens[7:]).logits, expected)

    def test_what_is_longer_than_the_window_or_of_another_model_is_not_resumed(
        self, model: CausalLM, open_model: MakeModel
    ) -> None:
        tokens, other = draw(model, 24), open_model(N_CTX)
        expected = read(model, tokens)
        model.rollback(0)
        model.decode(tokens[:20])
        parked = self.park(model)
        with pytest.raises(self.misuse):
            other.resume(parked)
        assert other.length == 0
        if model.spec.can_resize:
            model.rollback(0)
            model.decode(tokens[:8])
            model.resize(10)
            with pytest.raises(self.misuse):
                model.resume(parked)
            assert model.length == 8
            model.resize(N_CTX)
        model.resume(parked)
        self.assert_same(model, model.decode(tokens[20:]).logits, expected)

    def test_closing_ends_what_is_parked(self, model: CausalLM) -> None:
        model.decode(draw(model, 3))
        parked = self.park(model)
        model.close()
        parked.free()
        for call in (model.park, lambda: model.resume(parked), lambda: model.swap(parked)):
            with pytest.raises(EdgeSpecError, match="closed"):
                call()

    # Misuse

    def test_more_rows_than_tokens_are_refused(self, model: CausalLM) -> None:
        with pytest.raises(self.misuse):
            model.decode(draw(model, 2), rows=3)
        assert model.length == 0

    def test_rows_out_of_range_are_refused(self, model: CausalLM) -> None:
        for rows in (-1, model.spec.max_rows + 1):
            with pytest.raises(self.misuse):
                model.decode(draw(model, min(model.spec.max_rows + 1, N_CTX)), rows=rows)
        assert model.length == 0

    def test_tokens_outside_the_vocabulary_are_refused(self, model: CausalLM) -> None:
        for token in (-1, model.spec.n_vocab, 2**31, 2**40, -(2**63)):
            with pytest.raises(self.misuse):
                model.decode([1, token, 1])
        assert model.length == 0

    def test_the_first_and_last_token_of_the_vocabulary_are_allowed(self, model: CausalLM) -> None:
        assert np.isfinite(model.decode([0, model.spec.n_vocab - 1]).logits).all()

    def test_an_empty_decode_is_refused(self, model: CausalLM) -> None:
        with pytest.raises(self.misuse):
            model.decode([], rows=0)

    # Life

    def test_closing_twice_is_allowed(self, model: CausalLM) -> None:
        model.decode(draw(model, 3))
        model.close()
        model.close()

    def test_a_closed_model_says_so(self, model: CausalLM) -> None:
        tokens = draw(model, 3)
        model.close()
        with pytest.raises(EdgeSpecError, match="closed"):
            model.decode(tokens)
        with pytest.raises(EdgeSpecError, match="closed"):
            model.rollback(0)
        if model.spec.can_resize:
            with pytest.raises(EdgeSpecError, match="closed"):
                model.resize(N_CTX)

    def test_logits_stand_until_the_next_decode(self, model: CausalLM) -> None:
        view = model.decode(draw(model, 9), rows=3).logits
        taken = view.copy()
        model.rollback(4)
        assert np.array_equal(view, taken)

    def test_two_models_do_not_disturb_each_other(self, open_model: MakeModel) -> None:
        one, two = open_model(N_CTX), open_model(N_CTX)
        left, right = draw(one, 12), draw(one, 12, seed=1)
        alone = read(one, left), read(one, right)
        one.rollback(0)
        for position in range(12):
            ours = one.decode(left[position : position + 1]).logits
            theirs = two.decode(right[position : position + 1]).logits
        self.assert_same(one, ours, alone[0])
        self.assert_same(one, theirs, alone[1])

    def test_loading_again_gives_the_same_model(self, open_model: MakeModel) -> None:
        one, two = open_model(N_CTX), open_model(N_CTX)
        tokens = draw(one, 12)
        assert np.array_equal(read(one, tokens), read(two, tokens))

    def test_the_size_of_the_cache_does_not_change_the_logits(self, model: CausalLM, open_model: MakeModel) -> None:
        tokens = draw(model, 12)
        self.assert_same(model, read(model, tokens), read(open_model(N_CTX // 2), tokens))


class EqualRowsContract(CausalLMContract):
    """The laws of a backend that makes the promise behind exact speculation too."""

    def test_a_row_is_the_same_to_the_bit_in_every_pass(self, model: CausalLM) -> None:
        """For passes of 1 to 9 tokens, behind prefixes of several lengths, and after rollbacks."""
        assert model.spec.row_alignment is not None
        tokens, wrong = draw(model, 40), draw(model, 40, seed=1)
        expected = {}
        for position in range(40):
            expected[position] = model.decode(tokens[position : position + 1]).logits[0].copy()
        for prefix in (0, 1, 8, 17, 30):
            for width in range(1, min(9, model.spec.max_rows) + 1):
                model.rollback(prefix)
                model.decode(wrong[:width], rows=width)
                model.rollback(prefix)
                logits = model.decode(tokens[prefix : prefix + width], rows=width).logits
                for row in range(width):
                    assert np.array_equal(logits[row], expected[prefix + row]), (prefix, width, row)
            model.rollback(0)
            model.decode(tokens[:31], rows=0)

    def test_a_row_is_the_same_to_the_bit_behind_an_eviction(self, model: CausalLM) -> None:
        if not model.spec.can_evict:
            pytest.skip("the cache cannot evict")
        tokens = draw(model, 40)
        model.decode(tokens[:30], rows=0)
        model.evict(3, 13)
        expected = [model.decode(tokens[place : place + 1]).logits[0].copy() for place in range(30, 38)]
        for width in (2, 3, 8):
            model.rollback(20)
            logits = model.decode(tokens[30 : 30 + width], rows=width).logits
            for row in range(width):
                assert np.array_equal(logits[row], expected[row]), (width, row)


DROPS = [[(0, 1)], [(0, 20)], [(7, 8)], [(3, 36)], [(30, 38)], [(5, 20), (2, 9), (0, 4)]]
"""Spans of forty tokens that are dropped one after the other."""


class ShallowContract:
    """Laws of eviction in models of one layer, where a token's keys and values do not depend on those before it.

    So a cache that dropped tokens is, but for rounding, one that never read them.
    """

    atol: ClassVar[float] = 0.02
    alike: ClassVar[float] = 0.9999
    """Least correlation of the logits. Keys that are not turned move some by 1 and more."""

    @pytest.fixture
    def make_model(self) -> MakeModel:
        """Override: the way to load a model of one layer."""
        raise NotImplementedError

    @pytest.fixture
    def model(self, make_model: MakeModel) -> Iterator[CausalLM]:
        model = make_model(N_CTX)
        yield model
        model.close()

    @pytest.mark.parametrize("drops", DROPS)
    def test_what_was_evicted_might_never_have_been_read(self, model: CausalLM, drops: list[tuple[int, int]]) -> None:
        assert model.spec.can_evict
        tokens, more = draw(model, 40), draw(model, 4, seed=1)
        left = list(tokens)
        model.decode(tokens)
        for start, end in drops:
            model.evict(start, end)
            del left[start:end]
        logits = model.decode(more, rows=4).logits.copy()
        model.rollback(0)
        expected = model.decode(left + more, rows=4).logits
        np.testing.assert_allclose(logits, expected, rtol=0, atol=self.atol)
        assert np.corrcoef(logits.ravel(), expected.ravel())[0, 1] > self.alike


def draw(model: CausalLM, count: int, *, seed: int = 0) -> list[int]:
    """Random tokens of the model's vocabulary; the same for the same arguments."""
    return [int(token) for token in np.random.default_rng(seed).integers(0, model.spec.n_vocab, count)]


def read(model: CausalLM, tokens: list[int]) -> Logits:
    """The logits after `tokens`, [1, n_vocab], read from nothing in one decode; a copy."""
    model.rollback(0)
    return model.decode(tokens).logits.copy()
