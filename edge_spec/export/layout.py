"""Where every matrix of an export lies in its weights file, decided before a byte is written."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edge_spec.export.architecture import DecoderConfig, tensor_shapes
from edge_spec.export.graph import HEAD, Span, StoredMatrix
from edge_spec.export.quantize import EXACT_BITS, EXACT_BLOCK
from edge_spec.export.recipe import FINE_BITS, Recipe
from edge_spec.formats.gguf import TensorInfo, TensorTable

ALIGNMENT = 4096
"""Initializers start on pages, so that mapping one maps nothing of its neighbours."""

FUSED = {"attn_qkv": ("attn_q", "attn_k", "attn_v")}
"""Projections of the same input, stored under each other so that one product makes all of them."""


@dataclass(frozen=True, slots=True)
class Job:
    """One source tensor and the place of its rows: `first_row` of a stored matrix, carried over bit for bit or not."""

    tensor: TensorInfo
    matrix: StoredMatrix
    first_row: int
    exact: bool
    picked: NDArray[np.int64] | None = None
    """The rows of the tensor to take; None takes all."""

    @property
    def n_rows(self) -> int:
        """How many rows it takes."""
        return self.tensor.shape[0] if self.picked is None else len(self.picked)


@dataclass(frozen=True, slots=True)
class Layout:
    """`matrices` by the graph's names, `jobs` that fill them, `n_bytes` of the file."""

    matrices: dict[str, list[StoredMatrix]]
    jobs: list[Job]
    n_bytes: int

    @property
    def weight_bytes(self) -> int:
        """Bytes of packed weights, scales and zero points, without the padding between them."""
        parts = (part for parts in self.matrices.values() for part in parts)
        spans = (span for part in parts for span in (part.packed, part.scales, part.zeros) if span is not None)
        return sum(span.length for span in spans)


def plan_layout(
    source: TensorTable, config: DecoderConfig, recipe: Recipe, head_ids: NDArray[np.int64] | None = None
) -> Layout:
    """Give every projection of the decoder its place; parts that are stored alike are fused.

    `head_ids`: the rows of the output head to keep, None for all.
    """
    matrices: dict[str, list[StoredMatrix]] = {}
    jobs: list[Job] = []
    end = 0
    for name, tensors in _projections(source, config):
        matrices[name] = []
        fine = recipe.is_fine(name, config.n_layer)
        for bits, block, exact, group in _fuse(tensors, recipe, fine):
            picked = head_ids if name == HEAD else None
            row_length = group[0].shape[1]
            n_rows = sum(tensor.shape[0] for tensor in group) if picked is None else len(picked)
            packed = Span(_align(end), n_rows * row_length * bits // 8)
            scales = Span(_align(packed.offset + packed.length), n_rows * (row_length // block) * 4)
            end = scales.offset + scales.length
            zeros = None
            if recipe.zero_points and not exact and not fine:
                zeros = Span(_align(end), n_rows * -(-(row_length // block) * bits // 8))
                end = zeros.offset + zeros.length
            matrix = StoredMatrix(n_rows, row_length, bits, block, packed, scales, zeros)
            matrices[name].append(matrix)
            first_row = 0
            for tensor in group:
                jobs.append(Job(tensor, matrix, first_row, exact, picked))
                first_row += tensor.shape[0]
    return Layout(matrices, jobs, end)


def _projections(source: TensorTable, config: DecoderConfig) -> Iterator[tuple[str, list[TensorInfo]]]:
    """Names of the graph's projections with the source tensors of each."""
    fusable = {} if config.traits.fused_inputs else FUSED
    parts = {part for group in fusable.values() for part in group}
    for layer in range(config.n_layer):
        block = f"blk.{layer}."
        for fused, names in fusable.items():
            yield block + fused, [source.tensors[f"{block}{name}.weight"] for name in names]
        for name, shape in tensor_shapes(config).items():
            stem = name.removeprefix(block).removesuffix(".weight")
            if name.startswith(block) and len(shape) == 2 and stem not in parts:
                yield block + stem, [source.tensors[name]]
    yield HEAD, [source.tensors[config.head_tensor]]


def _fuse(tensors: list[TensorInfo], recipe: Recipe, fine: bool) -> Iterator[tuple[int, int, bool, list[TensorInfo]]]:
    """Group neighbours that are stored alike: (bits, block, exact, tensors)."""
    groups: list[tuple[int, int, bool, list[TensorInfo]]] = []
    for tensor in tensors:
        exact = recipe.exact and tensor.type in EXACT_BITS
        bits = EXACT_BITS[tensor.type] if exact else FINE_BITS if fine else recipe.bits
        block = EXACT_BLOCK if exact else recipe.block_for(tensor.shape[1])
        if groups and groups[-1][:3] == (bits, block, exact):
            groups[-1][3].append(tensor)
        else:
            groups.append((bits, block, exact, [tensor]))
    yield from groups


def _align(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT
