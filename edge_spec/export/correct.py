"""Rounding that makes up for itself: the error of each weight is spread over those that are not rounded yet.

A matrix is rounded some columns at a time. What they lose is added to the later columns in the proportion that changes
the outputs least, on the inputs that a calibration text gives the matrix. Source: GPTQ, arXiv 2210.17323, equations 2
and 3 and algorithm 1; with H the inputs' second moments, the inverse of H is needed only as its Cholesky factor.
Columns are taken in runs whose H is inverted by itself: the cost grows with the square of a run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from edge_spec.export.quantize import QuantizedRows, choose_steps, pack_levels

Array = NDArray[np.float32]
T = TypeVar("T", np.float32, np.uint8)

RUN_COLUMNS = 1536
"""About so many columns share their errors; a wider matrix is cut into runs of whole blocks."""

DAMPING = 0.5
"""Share of H's mean diagonal that is added to its diagonal: the text is short, and other texts differ from it. On
held-out text 0.2 to 1 left the smallest error, and 0.01 more than no correction at all in the widest matrices."""

_STRIP = 16
"""Columns that are rounded together. Their errors are passed on beyond the strip only, by a product of matrices: what
a column could have taken over from the few beside it, the many later ones take."""

_LEAST_DIAGONAL = 1e-8


@dataclass(frozen=True, slots=True)
class Run:
    """Columns from `start` on, and the upper triangular U with UᵀU the inverse of their H, float32 [columns, columns].

    Row i of U, over its diagonal, says how the error of column i is shared among later ones.
    """

    start: int
    factor: Array


def runs_of(width: int, block: int) -> list[slice]:
    """Runs of whole blocks that cover `width` columns, of about RUN_COLUMNS each."""
    blocks = width // block
    n_runs = -(-width // RUN_COLUMNS)
    edges = [blocks * i // n_runs * block for i in range(n_runs)] + [width]
    return [slice(start, stop) for start, stop in pairwise(edges) if stop > start]


def correction(inputs: Array, run: slice) -> Run:
    """What rounding a run of a matrix's columns needs to know of its `inputs`, float32 [tokens, row length]."""
    return Run(run.start, _inverse_factor(np.ascontiguousarray(inputs[:, run])))


def quantize_corrected(
    weights: Array, runs: Sequence[Run], *, bits: int, block: int, zero_points: bool
) -> QuantizedRows:
    """`weights` [N, K] in 2**bits levels a block, rounded so that products with the calibration inputs change least."""
    n_rows, width = weights.shape
    levels = np.empty((width, n_rows), np.uint8)
    scales = np.empty((width // block, n_rows), np.float32)
    zeros = np.empty((width // block, n_rows), np.float32)
    columns = _transposed(weights)
    for run in runs:
        stop = run.start + len(run.factor)
        errors = np.empty((len(run.factor), n_rows), np.float32)
        importance = (1 / np.square(run.factor.diagonal())).astype(np.float32)
        for at in range(run.start, stop, block):
            here, inside = slice(at, at + block), slice(at - run.start, at - run.start + block)
            if inside.start:
                columns[here] -= run.factor[: inside.start, inside].T @ errors[: inside.start]
            scale, zero = choose_steps(columns[here], bits=bits, zero_points=zero_points, importance=importance[inside])
            scales[at // block], zeros[at // block] = scale, zero
            levels[here] = _round_block(columns[here], run.factor[inside, inside], errors[inside], (scale, zero), bits)
    packed = pack_levels(_transposed(levels).reshape(n_rows, -1, block), bits)
    stored_zeros = np.ascontiguousarray(zeros.T).astype(np.uint8) if zero_points else None
    return QuantizedRows(packed, np.ascontiguousarray(scales.T), stored_zeros)


def _round_block(columns: Array, factor: Array, errors: Array, steps: tuple[Array, Array], bits: int) -> Array:
    """Levels of one block [block, N]; changes `columns`, and fills `errors` with what each column lost over U's
    diagonal."""
    scale, zero = steps
    top = np.float32((1 << bits) - 1)
    inverse = np.divide(1, scale, out=np.zeros_like(scale), where=scale != 0)
    levels = np.empty_like(columns)
    for strip in range(0, len(columns), _STRIP):
        part = slice(strip, min(strip + _STRIP, len(columns)))
        wanted, level, error = columns[part], levels[part], errors[part]
        np.multiply(wanted, inverse, out=level)
        level += zero
        np.rint(level, out=level)
        np.maximum(level, 0, out=level)
        np.minimum(level, top, out=level)
        np.subtract(level, zero, out=error)
        error *= scale
        np.subtract(wanted, error, out=error)
        error /= factor.diagonal()[part, None]
        columns[part.stop :] -= factor[part, part.stop :].T @ error
    return levels


def _transposed(matrix: NDArray[T]) -> NDArray[T]:
    """A contiguous transpose, made some rows at a time: as many as a line of the processor's cache holds values."""
    turned = np.empty(matrix.shape[::-1], matrix.dtype)
    for start in range(0, len(matrix), 64):
        turned[:, start : start + 64] = matrix[start : start + 64].T
    return turned


def _inverse_factor(inputs: Array) -> Array:
    """Upper triangular U with UᵀU the inverse of the damped second moments of `inputs` [tokens, columns].

    With both axes turned round, the inverse of H's lower Cholesky factor is U.
    """
    second_moments = inputs.T @ inputs
    diagonal = second_moments.reshape(-1)[:: len(second_moments) + 1]
    diagonal += np.float32(DAMPING) * diagonal.mean() + np.float32(_LEAST_DIAGONAL)
    return np.ascontiguousarray(_inverse_cholesky(second_moments[::-1, ::-1])[::-1, ::-1])


def _inverse_cholesky(matrix: Array) -> Array:
    """Inverse of the lower triangular L with L Lᵀ = `matrix`, by halves: nearly all of it is products of matrices, on
    which one thread is several times as fast as in LAPACK's factorisation."""
    n = len(matrix)
    if n <= 64:
        return np.tril(np.linalg.inv(np.linalg.cholesky(matrix)))
    half = n // 2
    first = _inverse_cholesky(matrix[:half, :half])
    below = matrix[half:, :half] @ first.T
    last = _inverse_cholesky(matrix[half:, half:] - below @ below.T)
    inverse = np.zeros_like(matrix)
    inverse[:half, :half], inverse[half:, half:] = first, last
    inverse[half:, :half] = -(last @ below) @ first
    return inverse
