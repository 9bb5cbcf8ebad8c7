"""Find an export's weights again: the graph says where each of them lies, so that other runtimes can use the files."""

from __future__ import annotations

import mmap
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from edge_spec.errors import ModelFormatError
from edge_spec.export.finished import Export
from edge_spec.export.graph import HEAD, Span, StoredMatrix, Weights

if TYPE_CHECKING:
    import onnx


def read_weights(export: Export) -> Weights:
    """The matrices (their places in the weights file) and vectors of an export, by the names that `build_graph` took.

    Raises ModelFormatError if the graph is not one that this exporter wrote.
    """
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load(str(export.model_file), load_external_data=False)
        return _weights(model.graph)
    except (OSError, DecodeError, KeyError, ValueError) as exc:
        raise ModelFormatError(f"{export.model_file} is not an export's graph: {exc!r}; export it again") from exc


def map_weights(export: Export) -> mmap.mmap:
    """The weights file, mapped read-only; ModelFormatError if it cannot be."""
    try:
        with export.weights_file.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as exc:
        raise ModelFormatError(f"{export.weights_file} cannot be mapped: {exc}") from exc


def give_back(pages: mmap.mmap) -> None:
    """Let the system drop the pages of a mapped file that were read; they come back from it if needed again."""
    if hasattr(mmap, "MADV_DONTNEED"):
        pages.madvise(mmap.MADV_DONTNEED)


def _weights(graph: onnx.GraphProto) -> Weights:
    import onnx

    spans: dict[str, Span] = {}
    vectors: dict[str, NDArray[np.float32]] = {}
    for tensor in graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            place = {entry.key: entry.value for entry in tensor.external_data}
            spans[tensor.name] = Span(int(place["offset"]), int(place["length"]))
        elif tensor.data_type == onnx.TensorProto.FLOAT and len(tensor.dims) == 1:  # not a number or a shape
            vectors[tensor.name] = onnx.numpy_helper.to_array(tensor)
    matrices: dict[str, list[StoredMatrix]] = {}
    for node in graph.node:
        if node.op_type != "MatMulNBits":
            continue
        _, packed, scales, *zeros = node.input
        size = {attribute.name: attribute.i for attribute in node.attribute}
        # `attn_qkv.weight`, or `attn_qkv.0.weight` for a part of what could not be fused.
        name = packed.removesuffix(".weight")
        stem, _, part = name.rpartition(".")
        matrices.setdefault(stem if part.isdecimal() else name, []).append(
            StoredMatrix(
                size["N"],
                size["K"],
                size["bits"],
                size["block_size"],
                spans[packed],
                spans[scales],
                spans[zeros[0]] if zeros else None,
            )
        )
    if HEAD not in matrices:
        raise ValueError("it makes no logits")
    return Weights(matrices, vectors)
