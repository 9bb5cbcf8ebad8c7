"""Bytes of the caches: keys and values, a cell a token, and the states of recurrent layers."""

from __future__ import annotations

from edge_spec.backends.alignment import MAX_ALIGNMENT, round_up
from edge_spec.errors import UsageError
from edge_spec.formats.ggml import GGMLType
from edge_spec.memory.facts import Layer, ModelFacts

KV_TYPES = {
    "f32": GGMLType.F32,
    "f16": GGMLType.F16,
    "bf16": GGMLType.BF16,
    "q8_0": GGMLType.Q8_0,
    "q5_1": GGMLType.Q5_1,
    "q5_0": GGMLType.Q5_0,
    "q4_1": GGMLType.Q4_1,
    "q4_0": GGMLType.Q4_0,
    "q8": GGMLType.I8,
}
"""Types of cache elements, as llama.cpp names them, and the onnx backend's bytes, whose scales are the model's."""

SUPPORTED_KV = {
    "onnx": ("f32", "q8"),
    "openvino": ("f32", "f16"),
    "llama": ("f16", "f32", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"),
}
"""Types that each backend can be asked for, its default first."""

OPENVINO_BLOCK = 32
LLAMA_CELLS = 256
"""llama.cpp rounds a context up to so many cells. Source: `llama-context.cpp`, `llama-kv-cache-iswa.cpp`."""


def find_kv_type(name: str | None, backend: str) -> GGMLType:
    """The type of a name, or the backend's default for None; UsageError names those that the backend has."""
    supported = SUPPORTED_KV[backend]
    if name is not None and name not in supported:
        raise UsageError(f"kv={name!r}: the {backend} backend has {', '.join(supported)}")
    return KV_TYPES[name or supported[0]]


def cells(n_ctx: int, backend: str) -> int:
    """Tokens that a backend makes room for when `n_ctx` are asked for."""
    if backend == "llama":
        return round_up(n_ctx, LLAMA_CELLS)
    capacity = n_ctx + MAX_ALIGNMENT - 1
    return round_up(capacity, OPENVINO_BLOCK) if backend == "openvino" else capacity


def cache_bytes(
    facts: ModelFacts, n_ctx: int, backend: str, kv: GGMLType, *, full_windows: bool = True, batch: int = 0
) -> int:
    """Bytes of keys and values for `n_ctx` tokens.

    Each layer stores cells x (row of keys + row of values), a row being the elements of all heads in whole blocks of
    the type. `full_windows`: windowed layers keep the whole context, as every backend here has them do, so that any
    rollback is exact; without it they keep the window and a pass of `batch` tokens, in llama.cpp's rounding.
    """
    full = cells(n_ctx, backend)
    total = 0
    for layer in facts.layers:
        count = full
        if layer.window and not full_windows:
            count = min(full, round_up(layer.window + batch, LLAMA_CELLS))
        total += count * token_bytes(layer, kv)
    return total


def token_bytes(layer: Layer, kv: GGMLType) -> int:
    """Bytes of one token in one layer; UsageError where the type's blocks do not divide its rows."""
    for width in (layer.key_width, layer.value_width):
        if width % kv.block_size:
            raise UsageError(f"rows of {width} elements do not divide into the blocks of {kv.name.lower()}: use f16")
    return (layer.key_width + layer.value_width) // kv.block_size * kv.type_size


def state_bytes(facts: ModelFacts, rollback: int = 0) -> int:
    """Bytes of the recurrent layers' states, float32, once more for every token that can be taken back."""
    elements = sum(layer.conv_state + layer.recurrent_state for layer in facts.layers)
    return elements * 4 * (1 + rollback)
