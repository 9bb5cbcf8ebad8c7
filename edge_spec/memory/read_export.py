"""Facts from an export's folder: its description, and the metadata that it kept of its source."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from edge_spec.errors import UnsupportedArchitectureError
from edge_spec.export.architecture import DecoderConfig, tensor_shapes
from edge_spec.export.finished import Export, open_export
from edge_spec.export.folder import is_graph_export, read_description
from edge_spec.export.graph import StoredMatrix
from edge_spec.export.layout import plan_layout
from edge_spec.export.stored import read_weights
from edge_spec.formats.gguf import GGMLType, GGUFFile, TensorInfo
from edge_spec.memory.facts import Layer, ModelFacts, Origin
from edge_spec.memory.read_gguf import count_merges


def facts_of_export(path: Path, *, name: str | None = None) -> ModelFacts:
    """Facts of an export's folder.

    ModelFormatError if it is not whole, UnsupportedArchitectureError if it has another layout than this exporter's.
    """
    if is_graph_export(read_description(path)):
        raise UnsupportedArchitectureError(
            f"{path}: what an export in optimum's layout holds while it runs is not known here, and is not guessed"
        )
    export = open_export(path)
    config = export.config
    with GGUFFile(export.source_file) as source:
        tensors = shaped_tensors(config, GGMLType.F32) | dict(source.tensors)
        n_merges = count_merges(source)
    return ModelFacts(
        name=name or path.resolve().name,
        origin=Origin.EXPORT,
        architecture=config.architecture,
        hidden=config.hidden,
        n_head=config.n_head,
        n_ff=config.n_ff,
        n_vocab=config.n_vocab,
        n_ctx_train=config.n_ctx_train,
        layers=decoder_layers(config),
        tensors=tensors,
        config=config,
        marked_ids=np.empty(0, np.int64),
        n_merges=n_merges,
        recipe=export.recipe,
        matrices=_matrices(export, tensors),
        sha256=export.source_sha256,
    )


def decoder_layers(config: DecoderConfig) -> tuple[Layer, ...]:
    """The layers of a decoder that the exporter builds."""
    heads, width = config.n_kv_head, config.head_dim
    return tuple(Layer(heads, width, width, config.window(layer)) for layer in range(config.n_layer))


def shaped_tensors(config: DecoderConfig, kind: GGMLType) -> dict[str, TensorInfo]:
    """The tensors that a decoder cannot do without, as if stored as `kind`; they lie nowhere."""
    shapes = tensor_shapes(config)
    return {name: shaped_tensor(name, shape, kind) for name, shape in shapes.items()}


def shaped_tensor(name: str, shape: tuple[int, ...], kind: GGMLType) -> TensorInfo:
    """A tensor of a shape that lies nowhere. Vectors are float32, as in every file."""
    kind = GGMLType.F32 if len(shape) == 1 else kind
    elements = int(np.prod(shape, dtype=np.int64))
    return TensorInfo(name, shape, kind, 0, elements // kind.block_size * kind.type_size, elements)


def _matrices(export: Export, tensors: dict[str, TensorInfo]) -> tuple[StoredMatrix, ...]:
    """Planned again from the shapes, as the exporter did; with an exact recipe the source's types decide too, and
    only the graph has kept them."""
    if export.recipe.exact:
        placed = read_weights(export).matrices
    else:
        table = _Tensors(tensors)
        placed = plan_layout(table, export.config, export.recipe, export.read_head_ids()).matrices
    return tuple(matrix for parts in placed.values() for matrix in parts)


class _Tensors:
    def __init__(self, tensors: dict[str, TensorInfo]) -> None:
        self.tensors = tensors
