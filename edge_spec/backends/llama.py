"""The `llama` backend: any GGUF that llama.cpp runs, through the low-level API of llama-cpp-python."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from edge_spec.backends._cache_limits import check_evicted, check_resized
from edge_spec.backends._cache_shape import CacheShape
from edge_spec.backends._llama_library import (
    forget_errors,
    import_library,
    last_reason,
    load_model,
)
from edge_spec.backends.top_k import top_k
from edge_spec.cores import check_threads
from edge_spec.errors import (
    BackendError,
    BackendMemoryError,
    CacheUnsupportedError,
    ContextLengthError,
    RollbackUnsupportedError,
    UnsupportedArchitectureError,
    UsageError,
)
from edge_spec.formats.ggml import GGMLType
from edge_spec.formats.gguf import GGUFFile
from edge_spec.types import Decoded, Logits, ModelSpec, Output

_DEFAULT_N_CTX = 4096
_ALLOCATION_FAILED = -2  # of llama_decode, for a compute buffer
_SEQUENCE = 0  # the only sequence in the cache
_KV_NAMES = ("f16", "f32", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
KV_TYPES = {name: GGMLType[name.upper()] for name in _KV_NAMES}
"""What keys and values can be stored as."""


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
        shape, turns = CacheShape.read(file), kv != "bf16" and _turns_keys(file)
    if any(width % KV_TYPES[kv].block_size for width in (shape.key_dim, shape.value_dim)):
        raise UsageError(f"kv={kv!r}: {name} has heads of {shape.key_dim} values, which are no whole blocks; use f16")
    model = load_model(library, path)
    try:
        n_ctx = _choose_n_ctx(library, model, n_ctx, name)
        _require_plain_decoder(library, model, name)
        params = _context_params(
            library,
            threads=check_threads(threads),
            max_rows=max_rows,
            n_batch=max(max_rows, min(n_batch, n_ctx)),
            kv=kv,
        )
        context = _make_context(library, model, params, n_ctx)
    except BaseException:
        library.llama_model_free(model)
        raise
    spec = _describe(library, model, context, shape, turns, name=name, n_ctx=n_ctx, max_rows=max_rows, kv=kv)
    return LlamaModel(library, model, context, params, spec)


class LlamaModel:
    """A `CausalLM` on one llama.cpp context. Made by `load`; not for use by two threads at once."""

    def __init__(self, library: Any, model: Any, context: Any, params: Any, spec: ModelSpec) -> None:
        self.spec = spec
        self._library = library
        self._params = params
        self._handles = _Handles(library, model, context)
        self._memory = library.llama_get_memory(context)
        self._window = int(library.llama_model_n_swa(model))
        self._length = 0
        self._unturned = False
        self._batch = _Batch(library, int(library.llama_n_batch(context)))
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
            if not self._library.llama_memory_seq_rm(self._memory, _SEQUENCE, length, -1):
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
        if not self._library.llama_memory_seq_rm(self._memory, _SEQUENCE, start, end):
            raise CacheUnsupportedError(f"{self.spec.name}: llama.cpp cannot drop tokens {start} to {end}")
        if end < self._length:
            self._library.llama_memory_seq_add(self._memory, _SEQUENCE, end, -1, start - end)
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

    def close(self) -> None:
        """Free context and weights; views on logits end here."""
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

    def _save(self) -> ctypes.Array[ctypes.c_uint8]:
        """The sequence's state, a copy."""
        size = int(self._library.llama_state_seq_get_size(self._handles.context, _SEQUENCE))
        saved: ctypes.Array[ctypes.c_uint8] = (ctypes.c_uint8 * size)()
        if self._library.llama_state_seq_get_data(self._handles.context, saved, size, _SEQUENCE) != size:
            raise BackendError(f"{self.spec.name}: llama.cpp did not save its cache")
        return saved

    def _renew(self, n_ctx: int, saved: ctypes.Array[ctypes.c_uint8]) -> None:
        """Put a context of `n_ctx` tokens that holds a saved state in the place of what there is."""
        handles = self._handles
        handles.drop_context()
        handles.context = _make_context(self._library, handles.model, self._params, n_ctx)
        self._memory = self._library.llama_get_memory(handles.context)
        self._restore(saved)

    def _restore(self, saved: ctypes.Array[ctypes.c_uint8]) -> None:
        """Read a saved state into the empty cache."""
        size, context = len(saved), self._handles.context
        if self._length and self._library.llama_state_seq_set_data(context, saved, size, _SEQUENCE) != size:
            raise BackendError(f"{self.spec.name}: llama.cpp did not restore its cache: {last_reason()}")

    def _run(self, ids: np.ndarray[Any, Any], rows: int) -> None:
        forget_errors()
        code = self._library.llama_decode(self._handles.context, self._batch.fill(ids, self._length, rows))
        if code != 0:
            cached = self._library.llama_memory_seq_pos_max(self._memory, _SEQUENCE) + 1
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
        oldest_kept = self._library.llama_memory_seq_pos_min(self._memory, _SEQUENCE)
        oldest_needed = max(0, length - self._window) if self._window else 0
        if oldest_kept > oldest_needed:
            raise RollbackUnsupportedError(
                f"{self.spec.name} keeps its state from position {oldest_kept} on (recurrent, or a sliding window); "
                f"going back to {length} tokens needs it from {oldest_needed} on: roll back to 0 and read again"
            )


class _Handles:
    """What llama.cpp allocated: freed once, in order, whatever a model went through."""

    def __init__(self, library: Any, model: Any, context: Any) -> None:
        self._library = library
        self.model = model
        self.context = context

    def drop_context(self) -> None:
        """Free the context, if there is one."""
        if self.context:
            self._library.llama_free(self.context)
        self.context = None

    def free(self) -> None:
        """Free everything."""
        self.drop_context()
        self._library.llama_model_free(self.model)


class _Batch:
    """One reusable `llama_batch` over NumPy arrays: ids at absolute positions, logits for the last rows only."""

    def __init__(self, library: Any, capacity: int) -> None:
        self.capacity = capacity
        self._ids = np.zeros(capacity, np.int32)
        self._positions = np.zeros(capacity, np.int32)
        self._wanted = np.zeros(capacity, np.int8)
        self._sequence_counts = np.ones(capacity, np.int32)
        self._sequence = (ctypes.c_int32 * 1)(_SEQUENCE)
        one = ctypes.cast(self._sequence, ctypes.POINTER(ctypes.c_int32))
        self._sequences = (ctypes.POINTER(ctypes.c_int32) * capacity)(*[one] * capacity)
        self._struct = library.llama_batch(
            token=self._ids.ctypes.data_as(ctypes.POINTER(ctypes.c_int32)),
            pos=self._positions.ctypes.data_as(ctypes.POINTER(ctypes.c_int32)),
            n_seq_id=self._sequence_counts.ctypes.data_as(ctypes.POINTER(ctypes.c_int32)),
            seq_id=self._sequences,
            logits=self._wanted.ctypes.data_as(ctypes.POINTER(ctypes.c_int8)),
        )

    def fill(self, ids: np.ndarray[Any, Any], start: int, rows: int) -> Any:
        """The struct for `ids` at positions from `start`, with logits for the last `rows`."""
        width = len(ids)
        self._ids[:width] = ids
        self._positions[:width] = np.arange(start, start + width)
        self._wanted[: width - rows] = 0
        self._wanted[width - rows : width] = 1
        self._struct.n_tokens = width
        return self._struct


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


def _turns_keys(file: GGUFFile) -> bool:
    """Whether llama.cpp turns cached keys to other positions rightly: it multiplies them by the magnitude of the
    rotary embedding once more, so that has to be 1 (measured with 0.3.36)."""
    factors = [file.hparam_float(f"rope.scaling.{name}", 1.0) for name in ("attn_factor", "yarn_attn_factor")]
    return file.hparam_str("rope.scaling.type", "none") != "yarn" and factors == [1, 1]


def _choose_n_ctx(library: Any, model: Any, n_ctx: int | None, name: str) -> int:
    trained = int(library.llama_model_n_ctx_train(model))
    if n_ctx is None:
        return min(_DEFAULT_N_CTX, trained)
    if n_ctx > trained:
        raise UsageError(f"n_ctx={n_ctx}: {name} was trained for {trained} tokens")
    return n_ctx


def _require_plain_decoder(library: Any, model: Any, name: str) -> None:
    encoder_only = not library.llama_model_has_decoder(model)
    if encoder_only or library.llama_model_has_encoder(model) or library.llama_model_is_diffusion(model):
        raise UnsupportedArchitectureError(f"{name} is not a causal language model (an encoder, or a diffusion model)")


def _context_params(library: Any, *, threads: int, max_rows: int, n_batch: int, kv: str) -> Any:
    params = library.llama_context_default_params()
    params.n_batch = params.n_ubatch = n_batch
    params.n_threads = params.n_threads_batch = threads
    params.n_seq_max = 1
    params.type_k = params.type_v = KV_TYPES[kv].value
    if KV_TYPES[kv].block_size > 1:
        params.flash_attn_type = library.LLAMA_FLASH_ATTN_TYPE_ENABLED  # the other attention takes no such values
    params.swa_full = True  # a window cut short could not be rolled back
    # More outputs than announced abort the process, and by default logits for a whole batch are reserved.
    params.n_outputs_max = params.n_outputs_max_per_seq = max_rows
    return params


def _make_context(library: Any, model: Any, params: Any, n_ctx: int) -> Any:
    params.n_ctx = n_ctx
    forget_errors()
    context = library.llama_init_from_model(model, params)
    if not context:
        raise BackendError(f"llama.cpp cannot make a context of {n_ctx} tokens: {last_reason()}; lower --ctx (n_ctx=)")
    return context


def _describe(
    library: Any,
    model: Any,
    context: Any,
    shape: CacheShape,
    turns: bool,
    *,
    name: str,
    n_ctx: int,
    max_rows: int,
    kv: str,
) -> ModelSpec:
    keeps_tokens = not (
        library.llama_model_is_recurrent(model)
        or library.llama_model_is_hybrid(model)
        # A windowed layer writes into places that its window has left, and dropping tokens moves the window back.
        or library.llama_model_n_swa(model)
    )
    return ModelSpec(
        name=name,
        architecture=shape.architecture,
        n_vocab=int(library.llama_vocab_n_tokens(library.llama_model_get_vocab(model))),
        n_ctx=n_ctx,
        n_ctx_train=int(library.llama_model_n_ctx_train(model)),
        n_layer=int(library.llama_model_n_layer(model)),
        n_kv_heads=max(shape.kv_heads),
        head_dim=shape.key_dim,
        weight_bytes=int(library.llama_model_size(model)),
        kv_bytes_per_token=shape.elements_per_token // KV_TYPES[kv].block_size * KV_TYPES[kv].type_size,
        max_rows=max_rows,
        row_alignment=None,  # llama.cpp picks its kernels by the number of rows, and their sums differ
        kv_type=kv,
        can_evict=turns and keeps_tokens and bool(library.llama_memory_can_shift(library.llama_get_memory(context))),
        can_resize=True,
    )
