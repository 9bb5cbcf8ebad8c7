"""Bytes of weights, by backend: what becomes anonymous memory, and what stays a mapped file."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from edge_spec.backends.alignment import round_up
from edge_spec.errors import UnsupportedArchitectureError
from edge_spec.export.graph import StoredMatrix
from edge_spec.export.layout import plan_layout
from edge_spec.export.recipe import Recipe, default_recipe
from edge_spec.export.trim import kept_ids
from edge_spec.formats.gguf import GGMLType, TensorInfo
from edge_spec.kernels.library import LANES
from edge_spec.memory.facts import ModelFacts, Origin


@dataclass(frozen=True, slots=True)
class WeightBytes:
    """`anonymous` bytes that the process owns, `mapped` bytes of files that the system may drop and read again, of
    which a token touches `touched`."""

    anonymous: int
    mapped: int
    touched: int


@lru_cache(maxsize=8)  # a target, its draft and the recipes that they are tried with, at many windows
def stored_matrices(facts: ModelFacts, recipe: Recipe | None) -> tuple[StoredMatrix, ...]:
    """The matrices of the export that a recipe (None: the default one) makes, or those of a finished export.

    Raises UnsupportedArchitectureError where the exporter refuses the model.
    """
    if facts.matrices is not None:
        return facts.matrices
    if facts.config is None:
        raise UnsupportedArchitectureError(f"{facts.refusal}; estimate it for the llama backend (--backend llama)")
    recipe = recipe or default_recipe(facts)
    head = kept_ids(facts.marked_ids, facts.n_vocab, recipe.head_rows)
    placed = plan_layout(facts, facts.config, recipe, head).matrices
    return tuple(matrix for parts in placed.values() for matrix in parts)


def head_rows(facts: ModelFacts, matrices: tuple[StoredMatrix, ...]) -> int:
    """Rows of the output head, which is the last of the matrices; `n_vocab` unless it is trimmed."""
    return min(facts.n_vocab, matrices[-1].n_rows)


def stored_bytes(matrices: tuple[StoredMatrix, ...]) -> int:
    """Packed weights, scales and zero points as the export's file has them, without the padding between them."""
    return sum(
        span.length for matrix in matrices for span in (matrix.packed, matrix.scales, matrix.zeros) if span is not None
    )


def onnx_weights(matrices: tuple[StoredMatrix, ...], machine: str) -> WeightBytes:
    """ONNX Runtime repacks every matrix at load: the copy is anonymous, scales and zero points stay mapped besides.

    Source: onnxruntime `contrib_ops/cpu/quantization/matmul_nbits.cc` (PrePack) and `core/mlas/lib`
    (Q4BitGemmPackQuantBDataSize, Q8BitGemmPackQuantBDataSize).
    """
    anonymous = sum(_packed_bytes(matrix, machine) for matrix in matrices)
    mapped = sum(matrix.scales.length + (matrix.zeros.length if matrix.zeros else 0) for matrix in matrices)
    return WeightBytes(anonymous, mapped, 0 if _is_x86(machine) else mapped)


def _packed_bytes(matrix: StoredMatrix, machine: str) -> int:
    packed = matrix.packed.length
    if not _is_x86(machine) and matrix.bits == 4:
        return packed
    # Beside the weights: their scales, and the sum of each block for 16 rows at a time, each part aligned.
    blocks = -(-matrix.row_length // matrix.block)
    return packed + 31 + matrix.n_rows * blocks * 4 + round_up(matrix.n_rows, 16) * blocks * 4 + 63


def openvino_weights(matrices: tuple[StoredMatrix, ...]) -> WeightBytes:
    """OpenVINO's CPU plugin copies every matrix into an order of its own, with its scales and zero points, the latter
    as one byte each; the mapped file is given back."""
    anonymous = 0
    for matrix in matrices:
        blocks = matrix.n_rows * (matrix.row_length // matrix.block)
        anonymous += matrix.packed.length + matrix.scales.length + (blocks if matrix.zeros else 0)
    return WeightBytes(anonymous, stored_bytes(matrices), 0)


def native_weights(matrices: tuple[StoredMatrix, ...], machine: str, features: frozenset[str]) -> WeightBytes:
    """The native kernels multiply weights where they are mapped, packed weights and scales.

    Anonymous is what a block's level 0 stands for, a float32 each in rows of whole vectors (`kernels.program`). 8 bits
    without zero points need it only where the kernels take weights without a sign. Zero points themselves are read
    when it is made, and no more.
    """
    unsigned = _is_unsigned(machine, features)
    counted = [matrix for matrix in matrices if matrix.bits == 4 or matrix.zeros or unsigned]
    anonymous = sum(4 * matrix.n_rows * round_up(matrix.row_length // matrix.block, LANES) for matrix in counted)
    touched = sum(matrix.packed.length + matrix.scales.length for matrix in matrices)
    return WeightBytes(anonymous, stored_bytes(matrices), touched)


def _is_unsigned(machine: str, features: frozenset[str]) -> bool:
    """Whether the native kernels' ZERO8 is not 0 on a processor: `kernels/vectors.h`."""
    if _is_x86(machine):
        return "avx2" not in features or "avx_vnni" in features or {"avx512_vnni", "avx512vl"} <= features
    return "asimddp" not in features


_X86_REPACKED = {GGMLType.Q4_0: 8, GGMLType.Q4_K: 8, GGMLType.IQ4_NL: 8, GGMLType.MXFP4: 8}
_X86_AVX512_REPACKED = {GGMLType.Q2_K: 8}
_ARM_REPACKED = {
    GGMLType.Q4_0: 4,
    GGMLType.Q4_K: 8,
    GGMLType.Q5_K: 8,
    GGMLType.Q6_K: 8,
    GGMLType.IQ4_NL: 4,
    GGMLType.MXFP4: 4,
    GGMLType.Q8_0: 4,
    GGMLType.Q1_0: 4,
}


def repacked_types(machine: str, features: frozenset[str]) -> dict[GGMLType, int]:
    """Types whose matrices llama.cpp copies into an order of its own, with the number that rows have to divide by.

    `features`: names of processor extensions (avx2, avx512f; asimddp). Source: ggml `ggml-cpu/repack.cpp`.
    """
    if _is_x86(machine):
        if "avx2" not in features:
            return {}
        return _X86_REPACKED | (_X86_AVX512_REPACKED if "avx512f" in features else {})
    return _ARM_REPACKED if "asimddp" in features else {}


def llama_weights(facts: ModelFacts, machine: str, features: frozenset[str]) -> WeightBytes:
    """llama.cpp maps the file, and copies the matrices that it has quicker kernels for; the copies are anonymous.

    The originals of copied matrices are not read again. Of the embedding table a token touches one row, unless it is
    the head too; of a mixture's experts those that are chosen.
    """
    types = repacked_types(machine, features)
    repacked = [tensor for tensor in facts.tensors.values() if _is_repacked(tensor, types)]
    copied = sum(tensor.n_bytes for tensor in repacked)
    head = facts.embedding
    if facts.tied and _divides(head, types):
        copied += head.n_bytes  # the head is a second tensor then, and goes where heads go
        read_head = 0
    else:
        read_head = head.n_bytes if facts.tied else 0
    names = {tensor.name for tensor in repacked} | {head.name}
    rest = sum(_active_bytes(tensor, facts) for tensor in facts.tensors.values() if tensor.name not in names)
    kept = [tensor for tensor in facts.tensors.values() if tensor not in repacked]
    return WeightBytes(copied, _span(kept, facts), rest + read_head)


def _span(kept: list[TensorInfo], facts: ModelFacts) -> int:
    """Of the file llama.cpp keeps mapped what lies from the first to the last tensor that it has not copied."""
    if facts.origin is not Origin.GGUF:
        return facts.tensor_bytes
    return max(tensor.offset + tensor.n_bytes for tensor in kept) - min(tensor.offset for tensor in kept)


def _active_bytes(tensor: TensorInfo, facts: ModelFacts) -> int:
    if "_exps" in tensor.name and facts.n_expert:
        return tensor.n_bytes * facts.n_expert_used // facts.n_expert
    return tensor.n_bytes


def _is_repacked(tensor: TensorInfo, types: dict[GGMLType, int]) -> bool:
    """Matrices of products, and experts; tables that rows are taken from stay as they are, and so do the matrices that
    latent attention has for each head."""
    is_matrix = len(tensor.shape) == 2 or (len(tensor.shape) == 3 and "_exps" in tensor.name)
    return tensor.name != "token_embd.weight" and is_matrix and _divides(tensor, types)


def _divides(tensor: TensorInfo, types: dict[GGMLType, int]) -> bool:
    return tensor.type in types and len(tensor.shape) >= 2 and tensor.shape[-2] % types[tensor.type] == 0


def _is_x86(machine: str) -> bool:
    return machine.lower() in ("x86_64", "amd64", "i686")
