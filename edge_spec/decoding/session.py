"""Makes a model's cache agree with the sequence that the caller names."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from edge_spec.backends.base import CausalLM, PaddedRows
from edge_spec.decoding.prefix import common_prefix
from edge_spec.errors import ContextLengthError, GenerationCancelled, RollbackUnsupportedError
from edge_spec.types import Context, Decoded, ModelSpec, Output, Progress

PREFILL_CHUNK = 128
"""Tokens read at a time: enough for full speed, few enough that cancelling is felt at once."""


class Session:
    """A model and the tokens that its cache holds.

    Callers name whole sequences and never touch the cache: rejected drafts, the missing token after a draft that was
    accepted in full, reuse between turns and abandoned generations are all the same case here.
    """

    def __init__(self, model: CausalLM, *, chunk: int = PREFILL_CHUNK) -> None:
        """`chunk`: tokens of a long sequence that are read at a time; fewer take less memory."""
        self._model = model
        self._chunk = chunk
        # None: unknown, because a call into the backend did not come back. The next use then starts from nothing.
        self._cached: list[int] | None = None
        self._asked = 0
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
        on_progress: Progress | None = None,
        chunk: int | None = None,
    ) -> Decoded:
        """Bring the cache to `context` and return what is wanted of its last `rows` positions: see `CausalLM.decode`.

        Reads only what the cache does not hold, `chunk` tokens (by default the session's) at a time, calling
        `on_progress(read, to_read)` after each; at least the last `rows` tokens are read again.
        `1 <= rows <= min(len(context), spec.max_rows)`.

        Raises ContextLengthError before anything is read if the context is longer than n_ctx; GenerationCancelled if
        `on_progress` returns False (what was read stays); BackendError from the backend (the session then starts
        afresh at its next use).
        """
        assert 1 <= rows <= min(len(context), self.spec.max_rows), (rows, len(context))
        sequence = context if isinstance(context, list) else list(context)
        if len(sequence) > self.spec.n_ctx:
            raise ContextLengthError(len(sequence), self.spec.n_ctx)

        self._asked = len(sequence)
        position = start = self._keep_prefix_of(sequence, len(sequence) - rows)
        chunk = max(chunk or self._chunk, rows)
        while len(sequence) - position > chunk:
            # What is left over for the last read must hold all the rows.
            stop = min(position + chunk, len(sequence) - rows)
            self._append(sequence[position:stop], 0, want)
            position = stop
            _report(on_progress, position - start, len(sequence) - start)
        decoded = self._append(sequence[position:], rows, want)
        _report(on_progress, len(sequence) - start, len(sequence) - start)
        return decoded

    def count_unread(self, context: Context) -> int:
        """Tokens of `context` that a decode of it would have to read."""
        return len(context) - common_prefix(self._cached or [], list(context))

    def reach(self, tokens: Context) -> None:
        """Where the model's head is trimmed: give logits to these tokens too."""
        reach = getattr(self._model, "reach", None)
        if reach is not None:
            reach(tokens)

    def resize(self, n_ctx: int) -> None:
        """Change the window to `n_ctx` tokens, which a cache gives memory back for; see `CausalLM.resize`.

        Of what is cached the beginning stays, as far as it fits.
        """
        cached = self._cached
        self._cached = None
        if cached is None or len(cached) > n_ctx:
            cached = (cached or [])[:n_ctx]
            self._model.rollback(len(cached))
        self._model.resize(n_ctx)
        self._cached = cached

    def forget(self) -> None:
        """Take the cache for empty: the next decode reads its whole sequence."""
        self._cached = None

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
        self._model.close()

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
        self._cached = [] if cached is None else cached[:length]
        return length

    def _append(self, tokens: list[int], rows: int, want: Output) -> Decoded:
        # The cache counts as unknown while the backend works, so that whatever interrupts it leaves no false belief.
        cached, self._cached = self._cached, None
        assert cached is not None
        decoded = self._model.decode(tokens, rows=rows, want=want)
        cached += tokens
        self._cached = cached
        return decoded


def _report(on_progress: Progress | None, done: int, total: int) -> None:
    if on_progress is not None and on_progress(done, total) is False:
        raise GenerationCancelled(f"cancelled after {done} of {total} tokens were read")
