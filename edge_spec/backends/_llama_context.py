"""What llama.cpp allocates for a model and its sequence, and what it is told beforehand."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from edge_spec.backends._cache_shape import CacheShape
from edge_spec.backends._llama_library import forget_errors, last_reason
from edge_spec.errors import BackendError, UnsupportedArchitectureError, UsageError
from edge_spec.formats.ggml import GGMLType
from edge_spec.formats.gguf import GGUFFile
from edge_spec.types import ModelSpec

SEQUENCE = 0
"""The only sequence in the cache."""
_DEFAULT_N_CTX = 4096
_KV_NAMES = ("f16", "f32", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
KV_TYPES = {name: GGMLType[name.upper()] for name in _KV_NAMES}
"""What keys and values can be stored as."""


class Handles:
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


class Batch:
    """One reusable `llama_batch` over NumPy arrays: ids at absolute positions, logits for the last rows only."""

    def __init__(self, library: Any, capacity: int) -> None:
        self.capacity = capacity
        self._ids = np.zeros(capacity, np.int32)
        self._positions = np.zeros(capacity, np.int32)
        self._wanted = np.zeros(capacity, np.int8)
        self._sequence_counts = np.ones(capacity, np.int32)
        self._sequence = (ctypes.c_int32 * 1)(SEQUENCE)
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


def turns_keys(file: GGUFFile) -> bool:
    """Whether llama.cpp turns cached keys to other positions rightly: it multiplies them by the magnitude of the
    rotary embedding once more, so that has to be 1 (measured with 0.3.36)."""
    factors = [file.hparam_float(f"rope.scaling.{name}", 1.0) for name in ("attn_factor", "yarn_attn_factor")]
    return file.hparam_str("rope.scaling.type", "none") != "yarn" and factors == [1, 1]


def choose_n_ctx(library: Any, model: Any, n_ctx: int | None, name: str) -> int:
    """Tokens of the cache: those that were asked for, else 4,096 or the model's limit. UsageError beyond that limit."""
    trained = int(library.llama_model_n_ctx_train(model))
    if n_ctx is None:
        return min(_DEFAULT_N_CTX, trained)
    if n_ctx > trained:
        raise UsageError(f"n_ctx={n_ctx}: {name} was trained for {trained} tokens")
    return n_ctx


def require_plain_decoder(library: Any, model: Any, name: str) -> None:
    """Raises UnsupportedArchitectureError for what does not write one token after the other."""
    encoder_only = not library.llama_model_has_decoder(model)
    if encoder_only or library.llama_model_has_encoder(model) or library.llama_model_is_diffusion(model):
        raise UnsupportedArchitectureError(f"{name} is not a causal language model (an encoder, or a diffusion model)")


def context_params(library: Any, *, threads: int, max_rows: int, n_batch: int, kv: str) -> Any:
    """llama.cpp's parameters of a context, but for its size."""
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


def make_context(library: Any, model: Any, params: Any, n_ctx: int) -> Any:
    """A context of `n_ctx` tokens. Raises BackendError: memory, as a rule."""
    params.n_ctx = n_ctx
    forget_errors()
    context = library.llama_init_from_model(model, params)
    if not context:
        raise BackendError(f"llama.cpp cannot make a context of {n_ctx} tokens: {last_reason()}; lower --ctx (n_ctx=)")
    return context


def describe(
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
    """Sizes and capabilities, as llama.cpp gives them; `turns`: see `turns_keys`."""
    has_state = bool(library.llama_model_is_recurrent(model) or library.llama_model_is_hybrid(model))
    # A windowed layer writes into places that its window has left, and dropping tokens moves the window back.
    keeps_tokens = not (has_state or library.llama_model_n_swa(model))
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
        # Of a windowed layer only the window is saved: a rejected draft could not be taken back behind it.
        can_park=not library.llama_model_n_swa(model),
        can_roll_back=not has_state,
    )
