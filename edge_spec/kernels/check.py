"""Whether compiled kernels multiply as they should: a few small matrices of every kind, beside NumPy."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from edge_spec.kernels.library import LANES, Activations, Kind, Matrix, Multiply, Pass, Rows, Step, Team

_KINDS = ((4, 256), (4, 128), (4, 64), (4, 32), (4, 16), (8, 256), (8, 32), (8, 16))
"""Bits and blocks: every way that weights are unpacked."""
_WEIGHTS, _ROWS, _BLOCKS = 7, 7, 9
_TOLERANCE = 1e-5
"""Of the sum of sizes: what float32 sums may be off."""


def find_fault(library: Any) -> str | None:
    """What products of the kernels are wrong, or depend on what else is in the pass; None if none are."""
    for bits, block in _KINDS:
        if fault := _fault(library, bits, block):
            return f"{library.edge_spec_kernel().decode()}: {bits} bits in blocks of {block} {fault}"
    return None


def _fault(library: Any, bits: int, block: int) -> str | None:
    rng = np.random.default_rng(block + bits)
    width = block * _BLOCKS
    weights = rng.integers(0, 1 << bits, (_WEIGHTS, width), dtype=np.uint8)
    zero = rng.integers(0, 16, (_WEIGHTS, _BLOCKS)) if bits == 4 else np.full((_WEIGHTS, _BLOCKS), 128)
    scales = rng.random((_WEIGHTS, _BLOCKS), np.float32)
    levels = rng.integers(-127, 128, (_ROWS, width)).astype(np.int8)
    levels[0], weights[0] = 127, (1 << bits) - 1  # the largest sums
    level_scales = rng.random((_ROWS, _BLOCKS), np.float32)
    sums = levels.reshape(_ROWS, _BLOCKS, block).sum(2, dtype=np.int64)
    lanes = -(-_BLOCKS // LANES) * LANES
    shares, lows = np.zeros((_ROWS, lanes), np.float32), np.zeros((_WEIGHTS, lanes), np.float32)
    shares[:, :_BLOCKS] = level_scales * sums
    lows[:, :_BLOCKS] = -scales * (zero if bits == 4 else library.edge_spec_zero8())

    centred = (weights.reshape(_WEIGHTS, _BLOCKS, block) - zero[:, :, None]) * scales[:, :, None].astype(np.float64)
    inputs = levels.reshape(_ROWS, _BLOCKS, block) * level_scales[:, :, None].astype(np.float64)
    expected = np.einsum("wbi,abi->aw", centred, inputs)
    size = np.einsum("wbi,abi->aw", np.abs(centred) + scales[:, :, None] * 16, np.abs(inputs))

    paired = 0 if bits == 8 else min(block, 64)
    stored = levels if not paired else _evens_first(levels, paired)
    packed = weights if bits == 8 else np.ascontiguousarray(weights[:, 0::2] | weights[:, 1::2] << 4)

    def products(first: int, count: int) -> Any:
        out = np.full((count, _WEIGHTS), np.nan, np.float32)
        held = [np.ascontiguousarray(array[first : first + count]) for array in (stored, level_scales, shares)]
        taken = Activations(*(array.ctypes.data for array in held), width, block, paired, _BLOCKS, lanes)
        matrix = (Matrix * 1)(
            Matrix(
                packed=packed.ctypes.data,
                scales=scales.ctypes.data,
                lows=lows.ctypes.data,
                out=out.ctypes.data,
                input=ctypes.pointer(taken),
                n_rows=_WEIGHTS,
                width=width,
                block=block,
                blocks=_BLOCKS,
                bits=bits,
                stride=_WEIGHTS,
            )
        )
        step = Multiply(matrices=matrix, n_matrices=1, rows=Rows.EVERY)
        steps = (Step * 1)(Step(Kind.MULTIPLY, ctypes.addressof(step)))
        library.edge_spec_run(ctypes.byref(Team(n_threads=1)), steps, 1, ctypes.byref(Pass(n_rows=count, n_threads=1)))
        return out

    whole = products(0, _ROWS)
    if not (np.abs(whole - expected) <= _TOLERANCE * size).all():
        return "are not what they should be"
    for count in (1, 2, 3, 5):
        for first in range(0, _ROWS - count + 1, count):
            if not np.array_equal(products(first, count), whole[first : first + count]):
                return f"differ in passes of {count} rows"
    return None


def _evens_first(levels: Any, group: int) -> Any:
    """Each row with the even ones of every `group` before the odd ones."""
    grouped = levels.reshape(len(levels), -1, group // 2, 2)
    return np.ascontiguousarray(grouped.swapaxes(2, 3).reshape(levels.shape))
