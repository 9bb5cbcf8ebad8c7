"""Makes a model's cache agree with the sequence that the caller names."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

from edge_spec.backends.base import CausalLM, PaddedRows, Scoring
from edge_spec.decoding.holes import Cached, unfold
from edge_spec.decoding.parking import Parking
from edge_spec.decoding.prefix import common_prefix
from edge_spec.decoding.reading import Reading
from edge_spec.errors import ContextLengthError, RollbackUnsupportedError
from edge_spec.types import Context, Decoded, Hole, ModelSpec, Output, Progress, TopK

PREFILL_CHUNK = 128
"""Tokens read at a time: enough for full speed, few enough that cancelling is felt at once."""


class Session:
    """A model and the tokens that its cache holds.

    Callers name whole sequences and never touch the cache: rejected drafts, the missing token after a draft that was
    accepted in full, reuse between turns and abandoned generations are all the same case here. So is a context that
    has lost tokens: a cache with holes serves a context with the very same holes. Where they differ, what came before
    the hole serves, and the rest is read as it was read at first: up to where the tokens went, then on without them.

    A sequence that another one displaces can be parked, and goes on where it was (`Parking`).
    """

    def __init__(
        self, model: CausalLM, *, exact: bool = True, chunk: int = PREFILL_CHUNK, parked_bytes: int = 0
    ) -> None:
        """`exact=False`, for a draft: holes are not told apart, and what was evicted is never read for their sake.

        `chunk`: tokens of a long sequence that are read at a time; fewer take less memory. `parked_bytes`: what
        sequences may hold that others have displaced.
        """
        self._model = model
        self._closed = False
        self._exact = exact
        self._chunk = chunk
        # None: unknown, because a call into the backend did not come back. The next use then starts from nothing.
        self._cached: list[int] | None = None
        self._holes: list[Hole] = []
        self._asked = 0
        self._parking = Parking(model, parked_bytes, exact=exact)
        self._may_resume = True
        self.num_read = 0
        """Tokens that the model was given by decoding so far."""
        self.num_refused_rollbacks = 0
        """Times that the backend could not shorten its cache, so that a whole context had to be read again."""

    @property
    def spec(self) -> ModelSpec:
        """What the model is and can do."""
        return self._model.spec

    @property
    def asked_length(self) -> int:
        """Tokens of the sequence that was asked for last."""
        return self._asked

    def decode(
        self,
        context: Context,
        *,
        rows: int = 1,
        want: Output = Output.LOGITS,
        holes: Sequence[Hole] = (),
        on_progress: Progress | None = None,
        chunk: int | None = None,
    ) -> Decoded:
        """Bring the cache to `context` and return what is wanted of its last `rows` positions: see `CausalLM.decode`.

        Reads only what the cache does not hold, `chunk` tokens (by default the session's) at a time, calling
        `on_progress(read, to_read)` after each; at least the last `rows` tokens are read again.
        `1 <= rows <= min(len(context), spec.max_rows)`. `holes`, oldest first, are what the context has lost; where the
        backend cannot evict, or the window is too small to read what was lost once more, they are taken for never read.

        Raises ContextLengthError before anything is read if the context is longer than n_ctx; GenerationCancelled if
        `on_progress` returns False (what was read stays); BackendError from the backend (the session then starts
        afresh at its next use).
        """
        assert 1 <= rows <= min(len(context), self.spec.max_rows), (rows, len(context))
        sequence = context if isinstance(context, list) else list(context)
        if len(sequence) > self.spec.n_ctx:
            raise ContextLengthError(len(sequence), self.spec.n_ctx)

        self._asked = len(sequence)
        self._change_over(sequence, holes)
        holes, limit = self._usable(sequence, holes), len(sequence) - rows
        assert not (holes and self._exact) or holes[-1].read <= limit, (holes[-1].read, limit)
        pending = self._num_known(holes) < len(holes)
        reading = Reading(on_progress, self.count_unread(sequence, holes) if pending else 0, chunk or self._chunk)
        self._follow(sequence, holes, limit, reading)
        start = self._keep_prefix_of(sequence, limit)
        self._parking.fit()
        reading.correct(len(sequence) - start)
        start = self._read(sequence, start, len(sequence), reading, rows=rows)
        decoded = self._append(sequence[start:], rows, want)
        reading.report(len(sequence) - start)
        return decoded

    def count_unread(self, context: Context, holes: Sequence[Hole] = ()) -> int:
        """Tokens that a decode of `context` would have to read."""
        sequence = list(context)
        usable = self._usable(sequence, holes)
        unread = self._known.count_unread(sequence, usable, exact=self._exact)
        return self._parking.count_unread(sequence, usable, unread) if self._may_resume else unread

    def follow(self, context: Context, holes: Sequence[Hole]) -> None:
        """Evict what a context has lost, all but its last token having been read, before anything more is."""
        sequence = list(context)
        self._asked = len(sequence)
        self._change_over(sequence, holes)
        self._follow(sequence, self._usable(sequence, holes), len(sequence) - 1, Reading(None, 0, self._chunk))
        self._parking.fit()

    def score(self, sequence: Sequence[int]) -> NDArray[np.float64]:
        """Minus the log-probability in nats of each token behind those before it, float64 [n]; 0 for the first.

        Reads the sequence anew. Where the model does not score long passes, it is asked for its likeliest tokens, a few
        rows at a time; one that is not among them counts as the least likely of them.
        """
        tokens, told = list(sequence), np.zeros(len(sequence))
        step = self._model.scored_rows if isinstance(self._model, Scoring) else self.spec.max_rows
        if not isinstance(self._model, Scoring):
            self.reach(tokens)
        self._change_over(tokens, ())
        self._undo(0)
        self._keep_prefix_of([], 0)
        self._parking.fit()
        for first in range(0, len(tokens) - 1, step):
            part, following = tokens[first : min(first + step, len(tokens) - 1)], tokens[first + 1 : first + step + 1]
            told[first + 1 : first + 1 + len(part)] = self._score(part, following)
        return told

    def _score(self, part: list[int], following: list[int]) -> NDArray[np.float64]:
        if not isinstance(self._model, Scoring):
            top = self._append(part, len(part), Output.TOP_K).top
            assert top is not None, "it was wanted"
            return _surprise(top, np.array(following, np.int64))
        cached, self._cached = self._cached, None
        assert cached is not None
        told = -self._model.score(part, following).astype(np.float64)
        cached += part
        self._cached = cached
        self._parking.fit()
        return told

    def trim(self, context: Context, holes: Sequence[Hole] = ()) -> int:
        """Drop from the cache what does not serve `context`; returns the number of tokens that are left.

        Reads nothing. For a cache that is about to be made smaller.
        """
        sequence = list(context)
        if self._num_known(holes) < len(self._holes):
            self._undo(self._num_known(holes))
        return self._keep_prefix_of(sequence, len(sequence))

    def reach(self, tokens: Context, *, anew: bool = False) -> None:
        """Where the model's head is trimmed: give logits to these tokens too, `anew` to no others beside the head's."""
        reach = getattr(self._model, "reach", None)
        if reach is not None:
            reach(tokens, anew=anew)

    def resize(self, n_ctx: int) -> None:
        """Change the window to `n_ctx` tokens, which a cache gives memory back for; see `CausalLM.resize`.

        Of what is cached the beginning stays, as far as it fits.
        """
        cached, self._cached = self._cached, None
        if cached is None or len(cached) > n_ctx:
            # A context with holes is read again: its beginning alone is that of no other.
            cached = (cached or [])[: 0 if self._holes else n_ctx]
            self._holes = []
            self._model.rollback(len(cached))
        self._parking.keep_within(n_ctx)
        try:
            self._model.resize(n_ctx)
        except BaseException:
            self._parking.clear()  # it may be in the memory that was being copied
            raise
        self._cached = cached

    def forget(self) -> None:
        """Take the cache for empty, and give up what is parked: the next decode reads its whole sequence."""
        self._cached = None
        self._parking.clear()

    def begin(self, *, anew: bool) -> None:
        """A generation begins. `anew`: nothing that was read before serves it, though what is parked stays so."""
        if anew:
            self._cached = None
        self._may_resume = not anew

    @property
    def num_parked(self) -> int:
        """Sequences that are parked."""
        return len(self._parking)

    @property
    def parked_bytes(self) -> int:
        """What they hold beyond what the cache holds too."""
        return self._parking.n_bytes

    def stop_parking(self) -> None:
        """Give up what is parked, and park nothing from now on."""
        self._parking.shut()

    @contextmanager
    def unpadded(self) -> Iterator[None]:
        """Within the block passes are not padded; nothing changes for a model that does not pad.

        The cache is forgotten at both ends: what unpadded passes left may differ in its last bits.
        """
        alignment = self.spec.row_alignment
        if alignment is None or not isinstance(self._model, PaddedRows):
            yield
            return
        self.forget()
        self._model.align_rows(None)
        try:
            yield
        finally:
            self.forget()
            self._model.align_rows(alignment)

    def close(self) -> None:
        """Close the model."""
        self._closed = True
        self._parking.shut()
        self._model.close()

    @property
    def is_closed(self) -> bool:
        """Whether the model was given back."""
        return self._closed

    @property
    def _known(self) -> Cached:
        """What the cache holds for certain."""
        return Cached([]) if self._cached is None else Cached(self._cached, self._holes)

    def _change_over(self, sequence: list[int], holes: Sequence[Hole]) -> None:
        """Where this is another sequence than before: park that one, and resume the one that serves this best."""
        if not self._parking.is_open:
            return
        usable = self._usable(sequence, holes)
        before, self._cached = (None if self._cached is None else self._known), None
        after = self._parking.change_over(before, sequence, usable, may_resume=self._may_resume)
        if after is not None:
            self._cached, self._holes = after.tokens, after.holes
        elif before is not None:
            self._cached = before.tokens

    def _usable(self, sequence: list[int], holes: Sequence[Hole]) -> tuple[Hole, ...]:
        """The holes, or none where they cannot be made."""
        if not holes or not self.spec.can_evict:
            return ()
        if self._exact and self._num_known(holes) < len(holes):
            unread = unfold(sequence, holes)[self._num_known(holes) :]
            if max(map(len, unread)) > self.spec.n_ctx:
                return ()
        return tuple(holes)

    def _num_known(self, holes: Sequence[Hole]) -> int:
        """How many of `holes`, from the oldest on, the cache has."""
        return self._known.num_known(holes)

    def _follow(self, sequence: list[int], holes: tuple[Hole, ...], limit: int, reading: Reading) -> None:
        """Give the cache these holes, undoing others; `sequence[:limit]` is what may be left of it then."""
        known = self._num_known(holes)
        self._undo(known)
        if known == len(holes) and (not holes or self._num_shared(sequence, limit) >= holes[-1].read):
            return
        stages = unfold(sequence, holes)
        # What was read before a hole was made cannot be changed behind it: such a hole is made again.
        while self._exact and known and self._num_shared(stages[known]) < holes[known - 1].read:
            known -= 1
            self._undo(known)
        for hole, stage in zip(holes[known:], stages[known:], strict=False):
            if not self._exact and self._num_shared(stage) < hole.end:
                self._holes.append(hole)
                continue
            before = len(self._holes)
            start = self._keep_prefix_of(stage, len(stage))
            assert len(self._holes) == before, "a backend that evicts can shorten its cache"
            start = self._read(stage, start, len(stage), reading)
            if start < len(stage):
                self._append(stage[start:], 0)
                reading.report(len(stage) - start)
            self._evict(hole)

    def _num_shared(self, sequence: list[int], limit: int = sys.maxsize) -> int:
        return min(limit, common_prefix(self._cached or [], sequence))

    def _undo(self, known: int) -> None:
        """Keep the oldest `known` holes only, and what of the cache did not see the others' tokens."""
        length = len(self._cached or [])
        while len(self._holes) > known:
            length = min(length, self._holes.pop().start)
        if self._exact and self._cached is not None and length < len(self._cached):
            self._keep_prefix_of(self._cached[:length], length)

    def _evict(self, hole: Hole) -> None:
        cached, self._cached = self._cached, None
        assert cached is not None
        self._model.evict(hole.start, hole.end)
        del cached[hole.start : hole.end]
        self._holes.append(hole)
        self._cached = cached

    def _read(self, sequence: list[int], start: int, end: int, reading: Reading, rows: int = 0) -> int:
        """Read whole chunks of `sequence[start:end]`; returns where the last one starts, which holds all the rows."""
        chunk = max(reading.chunk, rows)
        while end - start > chunk:
            stop = min(start + chunk, end - rows)
            self._append(sequence[start:stop], 0)
            reading.report(stop - start)
            start = stop
        return start

    def _keep_prefix_of(self, sequence: list[int], limit: int) -> int:
        """Shorten the cache to what it shares with `sequence[:limit]`; returns the length that is left."""
        cached = self._cached
        length = 0 if cached is None else min(common_prefix(cached, sequence), limit)
        if cached is not None and length == len(cached):
            return length
        self._cached = None
        try:
            self._model.rollback(length)
        except RollbackUnsupportedError:
            self.num_refused_rollbacks += 1
            length = 0
            self._model.rollback(0)
        if length == 0 and self._exact:
            self._holes = []
        self._cached = [] if cached is None else cached[:length]
        return length

    def _append(self, tokens: list[int], rows: int, want: Output = Output.LOGITS) -> Decoded:
        # The cache counts as unknown while the backend works, so that whatever interrupts it leaves no false belief.
        cached, self._cached = self._cached, None
        assert cached is not None
        decoded = self._model.decode(tokens, rows=rows, want=want)
        self.num_read += len(tokens)
        cached += tokens
        self._cached = cached
        self._parking.fit()  # a block that was shared may have been copied for it
        return decoded


def _surprise(top: TopK, tokens: NDArray[np.int64]) -> NDArray[np.float64]:
    """Minus the log-probability of one token after each row, or of the least likely that is told."""
    hits = top.ids == tokens[:, None]
    found = np.where(hits.any(axis=1), np.where(hits, top.logits, 0).sum(axis=1), top.logits[:, -1])
    return (top.log_sum - found).astype(np.float64)
