"""Bytes of the caches: keys and values, a cell a token, and the states of recurrent layers."""

from __future__ import annotations

from dataclasses import dataclass

from edge_spec.backends.alignment import MAX_ALIGNMENT, round_up
from edge_spec.errors import UsageError
from edge_spec.formats.ggml import GGMLType
from edge_spec.memory.facts import Layer, ModelFacts


@dataclass(frozen=True, slots=True)
class KvType:
    """How cache elements are stored: `block_size` of them in `type_size` bytes. `scale_rows` more bytes beside each
    head's row of values, and as many rows more beside each block of keys, hold scales."""

    name: str
    block_size: int
    type_size: int
    scale_rows: int = 0

    @property
    def bytes_per_element(self) -> float:
        """Bytes of an element, without what a row adds."""
        return self.type_size / self.block_size


def _ggml(kind: GGMLType) -> KvType:
    return KvType(kind.name.lower(), kind.block_size, kind.type_size)


_U8_SCALES = 8
"""OpenVINO keeps float32 scales and zero points: as in `backends._paged_cache`."""

_LLAMA = ("F16", "F32", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0")

KV_TYPES: dict[str, tuple[KvType, ...]] = {
    "onnx": (_ggml(GGMLType.F32), KvType("q8", 1, 1)),
    "native": (_ggml(GGMLType.F16), _ggml(GGMLType.F32)),
    "openvino": (_ggml(GGMLType.F16), _ggml(GGMLType.F32), KvType("u8", 1, 1, _U8_SCALES)),
    "llama": tuple(_ggml(GGMLType[name]) for name in _LLAMA),
}
"""Types that each backend stores keys and values as, its own first: as in `loading.KV_TYPES`."""

SUPPORTED_KV = {backend: tuple(kind.name for kind in kinds) for backend, kinds in KV_TYPES.items()}
"""Their names."""

OPENVINO_BLOCK = 32
LLAMA_CELLS = 256
"""llama.cpp rounds a context up to so many cells. Source: `llama-context.cpp`, `llama-kv-cache-iswa.cpp`."""


def find_kv_type(name: str | None, backend: str) -> KvType:
    """The type of a name, or the backend's own for None; UsageError names those that the backend has."""
    kinds = KV_TYPES[backend]
    for kind in kinds:
        if name in (None, kind.name):
            return kind
    raise UsageError(f"kv={name!r}: the {backend} backend stores keys and values as {', '.join(k.name for k in kinds)}")


def cells(n_ctx: int, backend: str) -> int:
    """Tokens that a backend makes room for when `n_ctx` are asked for."""
    if backend == "llama":
        return round_up(n_ctx, LLAMA_CELLS)
    capacity = n_ctx + MAX_ALIGNMENT - 1
    return round_up(capacity, OPENVINO_BLOCK) if backend == "openvino" else capacity


def cache_bytes(
    facts: ModelFacts, n_ctx: int, backend: str, kv: KvType, *, full_windows: bool = True, batch: int = 0
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


def token_bytes(layer: Layer, kv: KvType) -> int:
    """Bytes of one token in one layer; UsageError where the type's blocks do not divide its rows."""
    for width in (layer.key_width, layer.value_width):
        if width % kv.block_size:
            raise UsageError(f"rows of {width} elements do not divide into the blocks of {kv.name}: use f16")
    plain = (layer.key_width + layer.value_width) // kv.block_size * kv.type_size
    return plain + layer.key_width * kv.scale_rows // OPENVINO_BLOCK + layer.kv_heads * kv.scale_rows


def state_bytes(facts: ModelFacts, rollback: int = 0) -> int:
    """Bytes of the recurrent layers' states, float32, once more for every token that can be taken back."""
    elements = sum(layer.conv_state + layer.recurrent_state for layer in facts.layers)
    return elements * 4 * (1 + rollback)
