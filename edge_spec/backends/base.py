"""The protocol that every backend implements; `tests/contract.py` is its executable text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from edge_spec.types import Decoded, ModelSpec, Output


class Parked(Protocol):
    """A sequence that a model keeps beside its cache, with all that a later decode needs. Only that model takes it."""

    @property
    def length(self) -> int:
        """Number of its tokens."""
        ...

    @property
    def n_bytes(self) -> int:
        """What it holds beyond what the cache holds too.

        What several parked sequences share is divided among them, so that sums are right. May change whenever the
        cache does.
        """
        ...

    def free(self) -> None:
        """Give its memory back. Freeing twice, or after it was resumed or its model closed, is not an error."""
        ...


class CausalLM(Protocol):
    """A causal language model with one KV cache."""

    @property
    def spec(self) -> ModelSpec:
        """What this model is and can do."""
        ...

    @property
    def length(self) -> int:
        """Number of tokens in the cache."""
        ...

    def decode(self, tokens: Sequence[int], *, rows: int = 1, want: Output = Output.LOGITS) -> Decoded:
        """Append `tokens` to the cache and return what is wanted of the last `rows` of them.

        That is logits, shape [rows, n_vocab], or with `Output.TOP_K` the likeliest tokens, shape [rows, k].
        `0 <= rows <= min(len(tokens), spec.max_rows)`; rows 0 computes no logits. Views are valid until the next
        decode. Raises ContextLengthError before anything is cached if the tokens do not fit, BackendError if the
        library fails (the cache is then undefined: roll back to 0).
        """
        ...

    def rollback(self, length: int) -> None:
        """Keep the first `length` cached tokens (0 <= length <= self.length), forget the rest.

        Raises RollbackUnsupportedError if the backend cannot shorten its cache that far.
        """
        ...

    def evict(self, start: int, end: int) -> None:
        """Drop the cached tokens [start, end) (0 <= start <= end <= self.length); those behind them move down.

        A token that moved counts at its new position, in rotary embeddings and windows, as if it had been read there.
        What it took from the dropped tokens in deeper layers stays with it: no pass is paid for.
        Raises CacheUnsupportedError where `spec.can_evict` is False.
        """
        ...

    def resize(self, n_ctx: int) -> None:
        """Change the cache's length to `n_ctx` tokens, with those that it holds; `spec.n_ctx` follows.

        The memory of a longer cache goes back to the system. Raises UsageError, with the cache as it was, if the
        cached tokens do not fit or the model was not trained for `n_ctx`; BackendError if there is no memory for it
        (what is cached is then undefined, and what was parked may be free); CacheUnsupportedError where
        `spec.can_resize` is False.
        """
        ...

    @property
    def park_bytes(self) -> int:
        """Bytes that `park` would copy now; 0 where it copies nothing."""
        ...

    def park(self) -> Parked:
        """Keep what is cached beside the cache, which stays as it is.

        What is done to the cache afterwards does not change what is parked. Raises BackendMemoryError with the cache as
        it was, CacheUnsupportedError where `spec.can_park` is False.
        """
        ...

    def resume(self, parked: Parked) -> None:
        """Cache what was parked, to the bit, in place of what is cached; it is parked no longer.

        Also a way out of a failed decode. Raises UsageError, with the cache as it was, if it was freed or resumed, is
        another model's or longer than the window; BackendError if the library fails (the cache is then undefined).
        """
        ...

    def swap(self, parked: Parked) -> Parked:
        """`park` and `resume` in one, where a backend can without holding both sequences twice.

        Raises what they raise; BackendMemoryError leaves the cache and `parked` as they were.
        """
        ...

    def close(self) -> None:
        """Give the memory back; using the model afterwards is an error. Closing twice is not."""
        ...


@runtime_checkable
class PaddedRows(Protocol):
    """A model whose passes can be padded."""

    def align_rows(self, alignment: int | None) -> None:
        """Pad each pass to a multiple of `alignment` rows from now on, or (None) not at all."""
        ...


@runtime_checkable
class Scoring(Protocol):
    """A model that tells of every token of a long pass how likely the next one was, and nothing else."""

    @property
    def scored_rows(self) -> int:
        """Most tokens of one such pass: a row of logits is held for each."""
        ...

    def score(self, tokens: Sequence[int], following: Sequence[int]) -> NDArray[np.float32]:
        """Append `tokens` to the cache; the log-probability of `following[i]` behind `tokens[i]`, float32 [n].

        At most `scored_rows` tokens. Raises what `CausalLM.decode` raises.
        """
        ...
