"""Block quantisation in the layout of ONNX Runtime's MatMulNBits.

A row of K weights is cut into K/block blocks, each with one float scale; a weight is `(q - 2**(bits-1)) * scale`.
Packed weights are uint8 [N, K/block, block*bits/8], for 4 bits the even element in the low nibble; scales are
float32 [N, K/block]. Source of the layout: onnxruntime `docs/ContribOperators.md`, com.microsoft.MatMulNBits.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edge_spec.formats.gguf import GGMLType

EXACT_BITS = {GGMLType.Q4_0: 4, GGMLType.Q8_0: 8}
"""GGUF types whose blocks MatMulNBits can hold unchanged, with their bits; the block is 32."""

EXACT_BLOCK = 32


@dataclass(frozen=True, slots=True)
class QuantizedRows:
    """Some rows of a quantised matrix: `packed` uint8 [N, K/block, block*bits/8], `scales` float32 [N, K/block]."""

    packed: NDArray[np.uint8]
    scales: NDArray[np.float32]


def quantize_rows(weights: NDArray[np.float32], *, bits: int, block: int) -> QuantizedRows:
    """Round `weights` [N, K] to the nearest of 2**bits levels a block, K a multiple of `block`.

    The scale maps the weight of largest magnitude to the outermost (negative) level, whose sign the scale carries, so
    that no level is wasted: the rule of GGML's Q4_0.
    """
    zero = 1 << (bits - 1)
    n, k = weights.shape
    blocks = weights.reshape(n, k // block, block)
    high, low = blocks.max(axis=2), blocks.min(axis=2)
    extreme = np.where(high > -low, high, low)
    scales = np.asarray(extreme / np.float32(-zero), dtype=np.float32)
    inverse = np.divide(1, scales, out=np.zeros_like(scales), where=scales != 0)
    levels = blocks * inverse[:, :, None]
    # Adding a half and cutting off rounds to nearest, and is several times quicker than rint and a signed clip.
    levels += np.float32(zero + 0.5)
    np.minimum(levels, np.float32((1 << bits) - 1), out=levels)
    return QuantizedRows(_pack(levels.astype(np.uint8), bits), scales)


def repack_exact(raw: NDArray[np.uint8], kind: GGMLType) -> QuantizedRows:
    """Carry Q4_0 or Q8_0 rows over, every weight bit-equal. `raw` is uint8 [N, row_bytes] as stored in the GGUF.

    A Q4_0 block is a float16 scale and 16 bytes: elements 0-15 in the low nibbles, 16-31 in the high ones. A Q8_0
    block is a float16 scale and 32 int8. Source: ggml `ggml-common.h`.
    """
    type_size = {4: 18, 8: 34}[EXACT_BITS[kind]]
    blocks = raw.reshape(raw.shape[0], -1, type_size)
    scales = np.ascontiguousarray(blocks[:, :, :2]).view(np.float16)[:, :, 0].astype(np.float32)
    body = blocks[:, :, 2:]
    if kind == GGMLType.Q4_0:
        return QuantizedRows(_pack(np.concatenate([body & 0x0F, body >> 4], axis=2), 4), scales)
    return QuantizedRows(body ^ np.uint8(0x80), scales)


def dequantize_rows(rows: QuantizedRows, *, bits: int) -> NDArray[np.float32]:
    """The float32 weights [N, K] that `rows` stand for."""
    packed = rows.packed
    levels = packed if bits == 8 else np.stack([packed & 0x0F, packed >> 4], axis=-1).reshape(*packed.shape[:2], -1)
    values = (levels.astype(np.float32) - np.float32(1 << (bits - 1))) * rows.scales[:, :, None]
    return values.reshape(packed.shape[0], -1)


def _pack(levels: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Two 4-bit levels a byte, the even one low; 8-bit levels are bytes already."""
    return levels if bits == 8 else np.asarray(levels[..., 0::2] | (levels[..., 1::2] << 4))
