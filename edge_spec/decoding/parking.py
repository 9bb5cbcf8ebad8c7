"""Sequences that others have displaced, kept within a limit so that going on with one does not read it again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edge_spec.backends.base import CausalLM, Parked
from edge_spec.decoding.holes import Cached
from edge_spec.decoding.prefix import common_prefix
from edge_spec.decoding.supervisor import MEMORY_FAILURES
from edge_spec.types import Hole

WORTH_PARKING = 64
"""Tokens that would be lost, or saved, below which reading is as cheap as keeping."""
LOOSE_END = 16
"""Tokens at the end of a cache that the next turn may not have: a draft that was rejected, a stop string."""
LEAST_LEFT = 2 * LOOSE_END
"""Tokens behind a middle that is gone by which a chat is known again."""


@dataclass(slots=True, eq=False)
class _Kept:
    cached: Cached
    parked: Parked


class Parking:
    """Parked sequences of one model, within `limit_bytes`: what does not fit goes, the least recently used first.

    Bytes are those that the model tells: what a sequence shares with the cache costs nothing until the cache loses it.
    `exact`: as in `Session`.
    """

    def __init__(self, model: CausalLM, limit_bytes: int, *, exact: bool = True) -> None:
        self._model = model
        self._limit_bytes = limit_bytes if model.spec.can_park else 0
        self._exact = exact
        self._kept: list[_Kept] = []
        """The most recently used last."""

    @property
    def is_open(self) -> bool:
        """Whether anything may be parked at all."""
        return self._limit_bytes > 0

    @property
    def n_bytes(self) -> int:
        """What is held for parked sequences alone."""
        return sum(kept.parked.n_bytes for kept in self._kept)

    def __len__(self) -> int:
        return len(self._kept)

    def change_over(
        self, cached: Cached | None, sequence: list[int], holes: Sequence[Hole], *, may_resume: bool = True
    ) -> Cached | None:
        """Before `sequence` is read: park what that would lose, resume what serves it best.

        `cached` is what the cache holds, None where that is unknown. Returns what it holds now if that has changed,
        else None. Raises BackendError if the library fails: what the cache holds is then unknown.
        """
        here = cached or Cached([])
        lost = self._count_lost(here, sequence, holes)
        if max(lost, len(sequence) - len(here.tokens) + lost) < WORTH_PARKING:
            return None  # as at nearly every step of a generation
        best = self._best(sequence, holes, self._count_unread(here, sequence, holes)) if may_resume else None
        for kept in [kept for kept in self._kept if kept is not best and _is_earlier(kept.cached, sequence)]:
            self._give_up(kept)
        if lost >= WORTH_PARKING and not _is_earlier(here, sequence):
            self._park(here, instead_of=best)
        elif best is not None:
            self._resume(best)
        if best is None:
            return None
        lost = self._count_lost(best.cached, sequence, holes)
        if lost >= WORTH_PARKING and not _is_earlier(best.cached, sequence):
            # Another sequence that begins alike: the one that it begins like is still somebody's.
            self._park(best.cached)
        return best.cached

    def count_unread(self, sequence: list[int], holes: Sequence[Hole], unread: int) -> int:
        """Tokens that are left to read of a sequence of which the cache leaves `unread`."""
        best = self._best(sequence, holes, unread)
        return unread if best is None else self._count_unread(best.cached, sequence, holes)

    def fit(self) -> None:
        """Give up what no longer fits, now that the cache shares less with it."""
        if not self._kept:
            return
        for kept in [kept for kept in self._kept if kept.parked.n_bytes > self._limit_bytes]:
            self._give_up(kept)
        while self.n_bytes > self._limit_bytes:
            self._give_up(self._kept[0])

    def keep_within(self, n_ctx: int) -> None:
        """Give up what is longer than a window, and what no longer fits."""
        for kept in [kept for kept in self._kept if kept.parked.length > n_ctx]:
            self._give_up(kept)
        self.fit()

    def clear(self) -> None:
        """Give up everything."""
        while self._kept:
            self._give_up(self._kept[0])

    def shut(self) -> None:
        """Give up everything, and park nothing any more."""
        self._limit_bytes = 0
        self.clear()

    def _best(self, sequence: list[int], holes: Sequence[Hole], unread: int) -> _Kept | None:
        """What leaves clearly fewer tokens to read than the cache, and fewest."""
        if unread < WORTH_PARKING or not self._kept:
            return None
        best = min(self._kept, key=lambda kept: self._count_unread(kept.cached, sequence, holes))
        return best if unread - self._count_unread(best.cached, sequence, holes) >= WORTH_PARKING else None

    def _park(self, cached: Cached, instead_of: _Kept | None = None) -> None:
        """Park what is cached, if it can be, and resume what is to take its place, if anything is."""
        n_bytes = self._model.park_bytes
        if n_bytes > self._limit_bytes or self._is_kept(cached, instead_of):
            if instead_of is not None:
                self._resume(instead_of)
            return
        self._make_room(n_bytes, instead_of)
        # Off the list first: whatever interrupts it, what may be half in the cache is not taken for whole.
        if instead_of is not None:
            self._kept.remove(instead_of)
        try:
            parked = self._model.park() if instead_of is None else self._model.swap(instead_of.parked)
        except MEMORY_FAILURES:
            # Keeping is a favour: it will be read again.
            if instead_of is not None:
                self._take(instead_of)
            return
        except BaseException:
            if instead_of is not None:
                instead_of.parked.free()
            raise
        self._kept.append(_Kept(Cached(list(cached.tokens), list(cached.holes)), parked))

    def _is_kept(self, cached: Cached, besides: _Kept | None) -> bool:
        """Whether something else that is parked serves for `cached`, and is used so; else `cached` replaces some."""
        for kept in [kept for kept in self._kept if kept is not besides]:
            if self._covers(kept.cached, cached):
                self._kept.remove(kept)
                self._kept.append(kept)
                return True
            if self._covers(cached, kept.cached):
                self._give_up(kept)
        return False

    def _resume(self, kept: _Kept) -> None:
        self._kept.remove(kept)
        self._take(kept)

    def _take(self, kept: _Kept) -> None:
        """Cache what is off the list; whatever comes of it, it is not parked any more."""
        try:
            self._model.resume(kept.parked)
        finally:
            kept.parked.free()

    def _make_room(self, n_bytes: int, kept: _Kept | None) -> None:
        """Let so much more be held, once `kept` is resumed; the least recently used go for it."""
        leaving = kept.parked.n_bytes if kept else 0
        while self.n_bytes - leaving + n_bytes > self._limit_bytes:
            self._give_up(next(other for other in self._kept if other is not kept))

    def _give_up(self, kept: _Kept) -> None:
        self._kept.remove(kept)
        kept.parked.free()

    def _count_unread(self, cached: Cached, sequence: list[int], holes: Sequence[Hole]) -> int:
        if self._can_begin(cached, sequence, holes):
            return cached.count_unread(sequence, holes, exact=self._exact)
        return Cached([]).count_unread(sequence, holes, exact=self._exact)

    def _can_begin(self, cached: Cached, sequence: list[int], holes: Sequence[Hole]) -> bool:
        """Whether a model that cannot shorten its cache could go on from this one; any other model can."""
        return self._model.spec.can_roll_back or (
            len(cached.tokens) < len(sequence) and not self._count_lost(cached, sequence, holes)
        )

    def _count_lost(self, cached: Cached, sequence: list[int], holes: Sequence[Hole]) -> int:
        return len(cached.tokens) - cached.num_kept(sequence, holes, exact=self._exact)

    def _covers(self, kept: Cached, cached: Cached) -> bool:
        """Whether `kept` serves for all of `cached` but a few tokens."""
        shared = kept.num_kept(cached.tokens, cached.holes, exact=self._exact)
        if shared < len(kept.tokens) and not self._model.spec.can_roll_back:
            return False
        lost = len(cached.tokens) - shared
        return lost < WORTH_PARKING and (not self._exact or kept.num_known(cached.holes) == len(cached.holes))


def _is_earlier(cached: Cached, sequence: list[int]) -> bool:
    """Whether `sequence` is what is cached with a middle gone, and more: nobody asks for what it was again.

    So it is where `sequence`, behind what the two begin with, goes on with all that is cached from some later place on.
    """
    begin = common_prefix(cached.tokens, sequence)
    left, rest = cached.tokens[begin:], sequence[begin:]
    if min(len(left), len(rest)) < LEAST_LEFT:
        return False
    windows = np.lib.stride_tricks.sliding_window_view(np.array(left, np.int64), LEAST_LEFT)
    places = np.flatnonzero((windows == np.array(rest[:LEAST_LEFT], np.int64)).all(axis=1)).tolist()
    return any(place + common_prefix(left[place:], rest) >= len(left) - LOOSE_END for place in places)
