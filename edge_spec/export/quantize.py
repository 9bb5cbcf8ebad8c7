"""Block quantisation in the layout of ONNX Runtime's MatMulNBits.

A row of K weights is cut into K/block blocks, each with one float scale; a weight is `(q - zero) * scale`, where zero
is 2**(bits-1) or a level of the block's own.
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
    """Some rows of a quantised matrix.

    `packed` uint8 [N, K/block, block*bits/8], `scales` float32 [N, K/block], `zeros` uint8 [N, K/block] (the level that
    stands for 0 in each block) or None: 2**(bits-1) in all.
    """

    packed: NDArray[np.uint8]
    scales: NDArray[np.float32]
    zeros: NDArray[np.uint8] | None = None


def quantize_rows(weights: NDArray[np.float32], *, bits: int, block: int, zero_points: bool = False) -> QuantizedRows:
    """Round `weights` [N, K] to the nearest of 2**bits levels a block, K a multiple of `block`.

    Without zero points the scale maps the weight of largest magnitude to the outermost (negative) level, whose sign the
    scale carries, so that no level is wasted: the rule of GGML's Q4_0. With them each block's levels cover its range.
    Clipping it for a smaller squared error makes the model worse: large weights matter more than their number.
    """
    blocks = weights.reshape(len(weights), -1, block)
    if zero_points:
        return _quantize_with_zero_points(blocks, bits)
    zero = 1 << (bits - 1)
    high, low = blocks.max(axis=2), blocks.min(axis=2)
    scales = np.asarray(np.where(high > -low, high, low) / np.float32(-zero), dtype=np.float32)
    levels = blocks * _inverse(scales)[:, :, None]
    # Adding a half and cutting off rounds to nearest, and is several times quicker than rint and a signed clip.
    levels += np.float32(zero + 0.5)
    np.minimum(levels, np.float32((1 << bits) - 1), out=levels)
    return QuantizedRows(pack_levels(levels.astype(np.uint8), bits), scales)


def _quantize_with_zero_points(blocks: NDArray[np.float32], bits: int) -> QuantizedRows:
    top = np.float32((1 << bits) - 1)
    # Zero has to be a level: many weights are near it.
    high, low = np.maximum(blocks.max(axis=2), 0), np.minimum(blocks.min(axis=2), 0)
    scales = (high - low) / top
    zeros = np.clip(np.rint(-low * _inverse(scales)), 0, top)
    levels = blocks * _inverse(scales)[:, :, None]
    # Adding a half and cutting off rounds to nearest, as above. The lowest weight is at its level then, not below 0.
    levels += (zeros + np.float32(0.5))[:, :, None]
    np.minimum(levels, top, out=levels)
    return QuantizedRows(pack_levels(levels.astype(np.uint8), bits), scales, zeros.astype(np.uint8))


def _inverse(scales: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.divide(1, scales, out=np.zeros_like(scales), where=scales != 0)


def pack_zeros(zeros: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Zero points [N, blocks] as MatMulNBits wants them: uint8 [N, ceil(blocks*bits/8)], the even block low."""
    if bits == 4 and zeros.shape[1] % 2:
        zeros = np.pad(zeros, ((0, 0), (0, 1)))
    return pack_levels(zeros, bits)


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
        return QuantizedRows(pack_levels(np.concatenate([body & 0x0F, body >> 4], axis=2), 4), scales)
    return QuantizedRows(body ^ np.uint8(0x80), scales)


def dequantize_rows(rows: QuantizedRows, *, bits: int) -> NDArray[np.float32]:
    """The float32 weights [N, K] that `rows` stand for."""
    levels = unpack_levels(rows.packed, bits)
    zeros = np.float32(1 << (bits - 1)) if rows.zeros is None else rows.zeros.astype(np.float32)[:, :, None]
    values = (levels.astype(np.float32) - zeros) * rows.scales[:, :, None]
    return values.reshape(levels.shape[0], -1)


def unpack_levels(packed: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """The levels that `packed` holds, one a byte; the inverse of `pack_levels`."""
    return packed if bits == 8 else np.stack([packed & 0x0F, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)


def pack_levels(levels: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Two 4-bit levels a byte along the last axis, the even one low; 8-bit levels are bytes already."""
    return levels if bits == 8 else np.asarray(levels[..., 0::2] | (levels[..., 1::2] << 4))
