"""The `llama` backend: any GGUF that llama.cpp runs, through the low-level API of llama-cpp-python."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from edge_spec.backends._cache_limits import check_evicted, check_parks, check_resized
from edge_spec.backends._cache_shape import CacheShape
from edge_spec.backends._llama_context import (
    KV_TYPES,
    SEQUENCE,
    Batch,
    Handles,
    choose_n_ctx,
    context_params,
    describe,
    make_context,
    require_plain_decoder,
    turns_keys,
)
from edge_spec.backends._llama_library import (
    forget_errors,
    import_library,
    last_reason,
    load_model,
)
from edge_spec.backends._llama_state import ParkedState, State, restore, save, state_bytes
from edge_spec.backends._parked_here import ParkedHere
from edge_spec.backends.base import Parked
from edge_spec.backends.top_k import top_k
from edge_spec.cores import check_threads
from edge_spec.errors import (
    BackendError,
    BackendMemoryError,
    CacheUnsupportedError,
    ContextLengthError,
    RollbackUnsupportedError,
    UsageError,
)
from edge_spec.formats.gguf import GGUFFile
from edge_spec.types import Decoded, Logits, ModelSpec, Output

_ALLOCATION_FAILED = -2  # of llama_decode, for a compute buffer


def load(
    path: Path,
    *,
    name: str,
    n_ctx: int | None = None,
    threads: int | None = None,
    max_rows: int = 16,
    n_batch: int = 512,
    kv: str = "f16",
) -> LlamaModel:
    """Load a GGUF file with a cache of `n_ctx` tokens (default: 4,096, or the model's own limit if smaller).

    `threads` defaults to the physical cores, `max_rows` is the most rows of logits a decode can return, and longer
    inputs are read in passes of `n_batch` tokens. The weights are mapped. `kv` is one of KV_TYPES: what keys and values
    are stored as.

    Raises BackendUnavailableError (no library), ModelNotFoundError, ModelFormatError, UnsupportedArchitectureError,
    UsageError (a value out of range), or BackendError (llama.cpp cannot make a context: memory, as a rule).
    """
    for label, value in (("n_ctx", n_ctx), ("max_rows", max_rows), ("n_batch", n_batch)):
        if value is not None and value < 1:
            raise UsageError(f"{label}={value} must be at least 1")
    if max_rows > n_batch:
        raise UsageError(f"max_rows={max_rows} must not exceed n_batch={n_batch}")
    if kv not in KV_TYPES:
        raise UsageError(f"kv={kv!r}: the llama backend stores keys and values as {', '.join(KV_TYPES)}")
    library = import_library()
    with GGUFFile(path) as file:
        # To turn keys of bf16 ends the process (0.3.36).
        shape, turns = CacheShape.read(file), kv != "bf16" and turns_keys(file)
    if any(width % KV_TYPES[kv].block_size for width in (shape.key_dim, shape.value_dim)):
        raise UsageError(f"kv={kv!r}: {name} has heads of {shape.key_dim} values, which are no whole blocks; use f16")
    model = load_model(library, path)
    try:
        n_ctx = choose_n_ctx(library, model, n_ctx, name)
        require_plain_decoder(library, model, name)
        params = context_params(
            library,
            threads=check_threads(threads),
            max_rows=max_rows,
            n_batch=max(max_rows, min(n_batch, n_ctx)),
            kv=kv,
        )
        context = make_context(library, model, params, n_ctx)
    except BaseException:
        library.llama_model_free(model)
        raise
    spec = describe(library, model, context, shape, turns, name=name, n_ctx=n_ctx, max_rows=max_rows, kv=kv)
    return LlamaModel(library, model, context, params, spec)


class LlamaModel:
    """A `CausalLM` on one llama.cpp context. Made by `load`; not for use by two threads at once."""

    def __init__(self, library: Any, model: Any, context: Any, params: Any, spec: ModelSpec) -> None:
        self.spec = spec
        self._library = library
        self._params = params
        self._handles = Handles(library, model, context)
        self._memory = library.llama_get_memory(context)
        self._window = int(library.llama_model_n_swa(model))
        self._length = 0
        self._unturned = False
        self._batch = Batch(library, int(library.llama_n_batch(context)))
        self._parked: ParkedHere[ParkedState] = ParkedHere()
        self._release = weakref.finalize(self, self._handles.free)

    @property
    def length(self) -> int:
        """Number of tokens in the cache."""
        return self._length

    def decode(self, tokens: Sequence[int], *, rows: int = 1, want: Output = Output.LOGITS) -> Decoded:
        """Append `tokens`; the logits of the last `rows` of them, as a view on llama.cpp's own buffer.

        The view ends with the next decode or close. See `CausalLM.decode` for what is raised; a token outside the
        vocabulary, an empty input and rows out of range are UsageError.
        """
        self._require_open()
        ids = _checked_ids(tokens, self.spec.n_vocab)
        if not 0 <= rows <= min(len(ids), self.spec.max_rows):
            raise UsageError(f"rows={rows} of {len(ids)} tokens, at most {self.spec.max_rows}")
        if self._length + len(ids) > self.spec.n_ctx:
            raise ContextLengthError(self._length + len(ids), self.spec.n_ctx)
        self._settle()
        done = 0
        while len(ids) - done > self._batch.capacity:
            # The last pass must hold all the rows that are asked for: one pass's logits are one block of memory.
            width = min(self._batch.capacity, len(ids) - done - max(rows, 1))
            self._run(ids[done : done + width], 0)
            done += width
        self._run(ids[done:], rows)
        logits = self._logits(len(ids) - done, rows)
        return Decoded(logits) if want is Output.LOGITS else Decoded(logits[:0], top_k(logits))

    def rollback(self, length: int) -> None:
        """Keep the first `length` cached tokens.

        Raises RollbackUnsupportedError, with the cache as it was, if the model's state cannot go back that far.
        """
        self._require_open()
        if not 0 <= length <= self._length:
            raise UsageError(f"rollback to {length}: the cache holds {self._length} tokens")
        if length == 0:
            # Also the way out of a failed decode, so it must not depend on what the cache is thought to hold.
            self._library.llama_memory_clear(self._memory, False)
        elif length < self._length:
            self._require_history(length)
            if not self._library.llama_memory_seq_rm(self._memory, SEQUENCE, length, -1):
                raise RollbackUnsupportedError(
                    f"{self.spec.name}: llama.cpp cannot shorten its cache from {self._length} to {length} tokens"
                )
        self._length = length

    def evict(self, start: int, end: int) -> None:
        """See `CausalLM.evict`. The keys that moved are turned before the next decode, at the price of a pass of one
        token and a copy of the cache."""
        self._require_open()
        check_evicted(self.spec, start, end, self._length)
        if start == end:
            return
        if not self._library.llama_memory_seq_rm(self._memory, SEQUENCE, start, end):
            raise CacheUnsupportedError(f"{self.spec.name}: llama.cpp cannot drop tokens {start} to {end}")
        if end < self._length:
            self._library.llama_memory_seq_add(self._memory, SEQUENCE, end, -1, start - end)
            self._unturned = True
        self._length -= end - start

    def resize(self, n_ctx: int) -> None:
        """See `CausalLM.resize`: the sequence is saved, and restored into a new context.

        llama.cpp gives its caches a multiple of 256 tokens, and saves of a windowed layer only its window: rolling back
        past that is refused afterwards. If there is no memory for the new context, the old one is
        made again; if that fails too, the model is closed.
        """
        self._require_open()
        check_resized(self.spec, self._length, n_ctx)
        self._settle()
        saved = self._save()
        try:
            self._renew(n_ctx, saved)
        except BackendError:
            try:
                self._renew(self.spec.n_ctx, saved)
            except BackendError:
                self.close()
                raise
            raise
        self.spec = replace(self.spec, n_ctx=n_ctx)

    @property
    def park_bytes(self) -> int:
        """See `CausalLM.park_bytes`."""
        return state_bytes(self._library, self._handles.context)

    def park(self) -> Parked:
        """See `CausalLM.park`; costs a copy."""
        self._require_open()
        check_parks(self.spec)
        self._settle()
        return self._parked.add(ParkedState(self._save(), self._length))

    def resume(self, parked: Parked) -> None:
        """See `CausalLM.resume`; costs a copy."""
        self._require_open()
        taken = self._parked.check(self.spec, parked)
        assert taken.saved is not None, "it was checked"
        self._library.llama_memory_clear(self._memory, False)
        self._length, self._unturned = taken.length, False
        self._restore(taken.saved)
        taken.free()

    def swap(self, parked: Parked) -> Parked:
        """See `CausalLM.swap`; both sequences are held twice for a moment."""
        self._require_open()
        return self._parked.swap(self, parked)

    def close(self) -> None:
        """Free context and weights; views on logits end here."""
        self._parked.free()
        self._release()

    def _settle(self) -> None:
        """Turn the keys that an eviction moved, and put the cells in the order of their tokens.

        llama.cpp turns keys as part of a decode; a state that is saved before has the new positions and the old keys.
        New tokens would fill the holes, and sums run in another order than over a cache that was saved and restored.
        """
        if not self._unturned:
            return
        self._run(np.zeros(1, np.int32), 0)
        self.rollback(self._length - 1)
        saved = self._save()
        self._library.llama_memory_clear(self._memory, False)
        self._restore(saved)

    def _save(self) -> State:
        return save(self._library, self._handles.context, self.spec.name)

    def _renew(self, n_ctx: int, saved: State) -> None:
        """Put a context of `n_ctx` tokens that holds a saved state in the place of what there is."""
        handles = self._handles
        handles.drop_context()
        handles.context = make_context(self._library, handles.model, self._params, n_ctx)
        self._memory = self._library.llama_get_memory(handles.context)
        self._restore(saved)

    def _restore(self, saved: State) -> None:
        """Read a saved state into the empty cache."""
        if self._length:
            restore(self._library, self._handles.context, self.spec.name, saved)

    def _run(self, ids: np.ndarray[Any, Any], rows: int) -> None:
        forget_errors()
        code = self._library.llama_decode(self._handles.context, self._batch.fill(ids, self._length, rows))
        if code != 0:
            cached = self._library.llama_memory_seq_pos_max(self._memory, SEQUENCE) + 1
            self._length = max(0, int(cached))
            raise (BackendMemoryError if code == _ALLOCATION_FAILED else BackendError)(
                f"{self.spec.name}: llama.cpp failed to decode {len(ids)} tokens (code {code}): {last_reason()}"
            )
        self._length += len(ids)
        self._unturned = False

    def _logits(self, width: int, rows: int) -> Logits:
        """Rows of the last pass, [rows, n_vocab], in place."""
        if rows == 0:
            return np.empty((0, self.spec.n_vocab), np.float32)
        first, last = (
            self._library.llama_get_logits_ith(self._handles.context, index) for index in (width - rows, width - 1)
        )
        if not first or not last:
            raise BackendError(f"{self.spec.name}: llama.cpp returned no logits for a row that was asked for")
        stride = self.spec.n_vocab * ctypes.sizeof(ctypes.c_float)
        distance = ctypes.addressof(last.contents) - ctypes.addressof(first.contents)
        assert distance == (rows - 1) * stride, "llama.cpp keeps the rows of one sequence in order"
        return np.ctypeslib.as_array(first, (rows, self.spec.n_vocab))

    def _require_open(self) -> None:
        if not self._release.alive:
            raise BackendError(f"{self.spec.name} is closed")

    def _require_history(self, length: int) -> None:
        """Refuse where states that the next token attends to are gone, which `llama_memory_seq_rm` would not tell."""
        oldest_kept = self._library.llama_memory_seq_pos_min(self._memory, SEQUENCE)
        oldest_needed = max(0, length - self._window) if self._window else 0
        if oldest_kept > oldest_needed:
            raise RollbackUnsupportedError(
                f"{self.spec.name} keeps its state from position {oldest_kept} on (recurrent, or a sliding window); "
                f"going back to {length} tokens needs it from {oldest_needed} on: roll back to 0 and read again"
            )


def _checked_ids(tokens: Sequence[int], n_vocab: int) -> np.ndarray[Any, Any]:
    ids = np.asarray(tokens)
    if ids.ndim != 1 or ids.size == 0:
        raise UsageError("a decode needs at least one token, in one dimension")
    if ids.dtype.kind not in "iu":
        raise UsageError(f"token ids are whole numbers, not {ids.dtype}")
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= n_vocab:
        raise UsageError(f"token {low if low < 0 else high} is outside the vocabulary of {n_vocab}")
    return ids
