"""An export's graph with a cache of 8-bit integers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edge_spec.errors import ModelFormatError
from edge_spec.export import Export

if TYPE_CHECKING:
    import onnx

_SCALE_INPUTS = 12
"""Where GroupQueryAttention takes the scales of keys and values among its inputs."""


def quantized_graph(export: Export) -> bytes:
    """The graph, serialised, with int8 caches and, for each layer, the inputs `key_scale.L` and `value_scale.L`,
    float32 [n_kv_head * head_dim]. Matrices stay in the export's weights file.

    Raises ModelFormatError if the graph is not one that the exporter wrote.
    """
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load(str(export.model_file), load_external_data=False)
    except (OSError, DecodeError) as exc:
        raise ModelFormatError(f"{export.model_file} is not an export's graph: {exc!r}; export it again") from exc
    graph = model.graph
    for node in graph.node:
        if node.op_type == "GroupQueryAttention":
            _quantize_cache(node, node.output[1].removeprefix("key."))
    for value in (*graph.input, *graph.output):
        if value.name.split(".")[0] in ("past_key", "past_value", "key", "value"):
            value.type.tensor_type.elem_type = onnx.TensorProto.INT8
    width = export.config.n_kv_head * export.config.head_dim
    for layer in range(export.config.n_layer):
        for kind in ("key", "value"):
            name = f"{kind}_scale.{layer}"
            graph.input.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [width]))
    serialized: bytes = model.SerializeToString()
    return serialized


def _quantize_cache(node: onnx.NodeProto, layer: str) -> None:
    from onnx import helper

    node.input.extend([""] * (_SCALE_INPUTS - len(node.input)))
    node.input.extend([f"key_scale.{layer}", f"value_scale.{layer}"])
    quantised = {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL", "kv_cache_bit_width": 8}
    node.attribute.extend(helper.make_attribute(name, value) for name, value in quantised.items())
