"""Stored matrices as the kernels take them, and the activations that they are multiplied with."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from ctypes import pointer
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_spec.backends.alignment import round_up
from edge_spec.export.graph import StoredMatrix, Weights
from edge_spec.export.quantize import unpack_levels
from edge_spec.kernels.held import Floats, Held, floats
from edge_spec.kernels.library import CHUNK, LANES, Activations, Matrix

_Format = tuple[int, int]
"""How activations are quantised: in blocks of so many, the even ones first in every so many (see `Activations`)."""

_UNPACKED_ROWS = 1024
"""Rows whose zero points are unpacked at a time, so that a head's take no memory to speak of."""


class Matrices:
    """The matrices of a model, which stay where they are mapped."""

    def __init__(self, library: Any, weights: Weights, mapped: NDArray[np.uint8], held: Held) -> None:
        self._library, self._weights, self._mapped, self._held = library, weights, mapped, held
        self._quantised: dict[tuple[str, _Format], Activations] = {}

    def vector(self, name: str) -> int:
        """The address of a vector."""
        return self._held.at(self._weights.vectors[name])

    def of(self, name: str, source: str, out: Floats) -> Iterator[Matrix]:
        """The parts of a projection, applied to what `source` makes, their products side by side in `out`."""
        bias = self._weights.vectors.get(f"{name}.bias")
        first = 0
        for part in self._weights.matrices[name]:
            yield Matrix(
                packed=self._span(part.packed.offset),
                scales=self._span(part.scales.offset),
                lows=self._lows(part),
                bias=None if bias is None else self._held.at(bias[first:]),
                out=self._held.at(out[:, first:]),
                input=pointer(self._activations(source, part)),
                n_rows=part.n_rows,
                width=part.row_length,
                block=part.block,
                blocks=part.row_length // part.block,
                bits=part.bits,
                stride=out.strides[0] // 4,
            )
            first += part.n_rows

    def levels(self, source: str, consumers: Iterable[str]) -> list[Activations]:
        """What `source` makes, in each form that the projections which take it need."""
        parts = {_format(part): part for name in consumers for part in self._weights.matrices[name]}
        return [self._activations(source, part) for part in parts.values()]

    def _activations(self, source: str, part: StoredMatrix) -> Activations:
        """What `source` makes, quantised for a matrix; sources that are done with share it."""
        block, paired = _format(part)
        key = (f"{source} {part.row_length}", (block, paired))
        if key not in self._quantised:
            blocks = part.row_length // block
            self._quantised[key] = Activations(
                levels=self._held.at(np.zeros((CHUNK, part.row_length), np.int8)),
                scales=self._held.at(floats(CHUNK, blocks)),
                shares=self._held.at(floats(CHUNK, round_up(blocks, LANES))),
                width=part.row_length,
                block=block,
                paired=paired,
                blocks=blocks,
                lanes=round_up(blocks, LANES),
            )
        return self._quantised[key]

    def _lows(self, part: StoredMatrix) -> int | None:
        """What a block's level 0 stands for, [n_rows, lanes]; None where the kernels take levels as they are meant."""
        blocks = part.row_length // part.block
        # 8-bit levels are taken as they are by some processors' kernels, and less 128 by others.
        taken_off = 0 if part.bits == 4 else 128 - self._library.edge_spec_zero8()
        middle = (1 << (part.bits - 1)) - taken_off
        if part.zeros is None and not middle:
            return None
        scales = self._mapped[part.scales.offset :][: part.scales.length].view(np.float32).reshape(-1, blocks)
        lows = floats(part.n_rows, round_up(blocks, LANES))
        if part.zeros is None:
            np.multiply(scales, np.float32(-middle), out=lows[:, :blocks])
            return self._held.at(lows)
        packed = self._mapped[part.zeros.offset :][: part.zeros.length].reshape(part.n_rows, -1)
        for first in range(0, part.n_rows, _UNPACKED_ROWS):
            rows = slice(first, first + _UNPACKED_ROWS)
            zeros = unpack_levels(packed[rows], part.bits)[:, :blocks].astype(np.float32) - taken_off
            np.multiply(scales[rows], -zeros, out=lows[rows, :blocks])
        return self._held.at(lows)

    def _span(self, offset: int) -> int:
        return int(self._mapped.ctypes.data) + offset


def _format(part: StoredMatrix) -> _Format:
    """What a matrix takes: 4-bit weights lie in pairs, and up to 64 are unpacked at a time."""
    return part.block, 0 if part.bits == 8 else min(part.block, 64)
