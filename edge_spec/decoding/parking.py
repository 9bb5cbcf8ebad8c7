"""Sequences that others have displaced, kept within a limit so that going on with one does not read it again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from edge_spec.backends.base import CausalLM, Parked
from edge_spec.decoding.holes import Cached
from edge_spec.decoding.supervisor import MEMORY_FAILURES
from edge_spec.types import Hole

WORTH_PARKING = 64
"""Tokens that would be lost, or saved, below which reading is as cheap as keeping."""


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

    def change_over(self, cached: Cached | None, sequence: list[int], holes: Sequence[Hole]) -> Cached | None:
        """Before `sequence` is read: park what that would lose, resume what serves it best.

        `cached` is what the cache holds, None where that is unknown. Returns what it holds now if that has changed,
        else None. Raises BackendError if the library fails: what the cache holds is then unknown.
        """
        here = cached or Cached([])
        lost = self._count_lost(here, sequence, holes)
        if max(lost, len(sequence) - len(here.tokens) + lost) < WORTH_PARKING:
            return None  # as at nearly every step of a generation
        best = self._best(sequence, holes, here.count_unread(sequence, holes, exact=self._exact))
        if lost >= WORTH_PARKING:
            self._park(here, instead_of=best)
        elif best is not None:
            self._resume(best)
        if best is None:
            return None
        if self._count_lost(best.cached, sequence, holes) >= WORTH_PARKING:
            # Another sequence that begins alike: the one that it begins like is still somebody's.
            self._park(best.cached)
        return best.cached

    def count_unread(self, sequence: list[int], holes: Sequence[Hole], unread: int) -> int:
        """Tokens that are left to read of a sequence of which the cache leaves `unread`."""
        best = self._best(sequence, holes, unread)
        return unread if best is None else self._count_unread(best, sequence, holes)

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
        best = min(self._kept, key=lambda kept: self._count_unread(kept, sequence, holes))
        return best if unread - self._count_unread(best, sequence, holes) >= WORTH_PARKING else None

    def _park(self, cached: Cached, instead_of: _Kept | None = None) -> None:
        """Park what is cached, if it can be, and resume what is to take its place, if anything is."""
        if self._is_kept(cached, instead_of) or not self._make_room(self._model.park_bytes, instead_of):
            if instead_of is not None:
                self._resume(instead_of)
            return
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

    def _make_room(self, n_bytes: int, kept: _Kept | None) -> bool:
        """Whether so much more can be held, once `kept` is resumed; the least recently used go for it."""
        if n_bytes > self._limit_bytes:
            return False
        leaving = kept.parked.n_bytes if kept else 0
        while self.n_bytes - leaving + n_bytes > self._limit_bytes:
            self._give_up(next(other for other in self._kept if other is not kept))
        return True

    def _give_up(self, kept: _Kept) -> None:
        self._kept.remove(kept)
        kept.parked.free()

    def _count_unread(self, kept: _Kept, sequence: list[int], holes: Sequence[Hole]) -> int:
        return kept.cached.count_unread(sequence, holes, exact=self._exact)

    def _count_lost(self, cached: Cached, sequence: list[int], holes: Sequence[Hole]) -> int:
        return len(cached.tokens) - cached.num_kept(sequence, holes, exact=self._exact)

    def _covers(self, kept: Cached, cached: Cached) -> bool:
        """Whether `kept` serves for all of `cached` but a few tokens."""
        lost = len(cached.tokens) - kept.num_kept(cached.tokens, cached.holes, exact=self._exact)
        return lost < WORTH_PARKING and (not self._exact or kept.num_known(cached.holes) == len(cached.holes))
