"""Turn the float32 graph that optimum writes into one of 4- or 8-bit matrices.

The layout stays: `input_ids`, `attention_mask`, perhaps `position_ids`, and for each layer a past key and value in and
a present one out. Every product with a constant matrix (MatMul, Gemm) becomes a MatMulNBits in the layout of
`export.quantize`; embedding tables become float16; where logits come from a product with a constant matrix, only the
positions that the new input `rows` (int64 [R]) names get any.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from edge_spec.errors import ModelFormatError, UnsupportedArchitectureError, UsageError
from edge_spec.export.filling import CHUNK_WEIGHTS, ByteProgress
from edge_spec.export.layout import ALIGNMENT
from edge_spec.export.quantize import pack_zeros, quantize_rows
from edge_spec.export.recipe import Recipe

if TYPE_CHECKING:
    import onnx

PAST = re.compile(r"past_key_values\.(\d+)\.(key|value)")
ROWS = "rows"

_INLINE_BYTES = 1 << 16
"""Constants up to this size stay inside the graph, where shape inference can read them."""
_MS = "com.microsoft"
_KEEPS_ROWS = ("Add", "Cast", "Div", "Identity", "Mul", "Tanh")
"""Operations between the head's product and the logits that treat each position by itself."""
_COPIES = ("Identity", "Transpose")


@dataclass(frozen=True, slots=True)
class GraphShape:
    """The sizes that the graph itself tells."""

    n_layer: int
    n_kv_head: int
    head_dim: int
    n_vocab: int


@dataclass(frozen=True, slots=True)
class _Constant:
    """A constant matrix as a product takes it: an initializer, perhaps transposed. `shape` is that of the product."""

    tensor: Any
    transposed: bool

    @property
    def shape(self) -> tuple[int, ...]:
        dims = tuple(self.tensor.dims)
        return dims[::-1] if self.transposed else dims


def quantize_graph(
    source: Path,
    model_file: Path,
    weights_file: Path,
    recipe: Recipe,
    *,
    threads: int | None = None,
    progress: ByteProgress | None = None,
) -> tuple[GraphShape, int]:
    """Write the graph of `source` with its matrices as `recipe` says; returns its sizes and the bytes of its matrices.

    Matrices whose rows do not divide into blocks stay as they are. Raises UnsupportedArchitectureError where the graph
    has another layout, ModelFormatError (naming the tensor) for weights that are not finite or not floats.
    """
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load(str(source), load_external_data=False)
    except (OSError, DecodeError) as exc:
        raise ModelFormatError(f"{source} is not an ONNX graph: {exc}") from exc
    shape = _read_shape(model.graph)
    with weights_file.open("wb") as file:
        writer = _Writer(
            model, source.parent, file, file_name=weights_file.name, recipe=recipe, threads=threads, progress=progress
        )
        writer.rewrite()
    if not any(opset.domain == _MS for opset in model.opset_import):
        model.opset_import.append(onnx.helper.make_opsetid(_MS, 1))
    model.ir_version = max(model.ir_version, 8)
    model_file.write_bytes(model.SerializeToString())
    return shape, writer.weight_bytes


def _read_shape(graph: onnx.GraphProto) -> GraphShape:
    inputs = {value.name: _dims(value) for value in graph.input}
    outputs = {value.name: _dims(value) for value in graph.output}
    past = {name: dims for name, dims in inputs.items() if PAST.fullmatch(name)}
    layers = {int(PAST.fullmatch(name)[1]) for name in past}  # type: ignore[index]
    expected = {f"past_key_values.{i}.{kind}" for i in range(len(layers)) for kind in ("key", "value")}
    present = {name.replace("past_key_values", "present") for name in expected}
    unknown = inputs.keys() - past.keys() - {"input_ids", "attention_mask", "position_ids"}
    missing = (expected - past.keys()) | ({"input_ids", "attention_mask"} - inputs.keys())
    missing |= ({"logits"} | present) - outputs.keys()
    shapes = {tuple(dims[i] for i in (1, 3)) for dims in past.values() if len(dims) == 4}
    whole = len(shapes) == 1 and all(type(n) is int and n > 0 for n in next(iter(shapes)))
    n_vocab = (outputs.get("logits") or [0])[-1]
    if unknown or missing or not layers or not whole or type(n_vocab) is not int or n_vocab < 1:
        told = sorted([*(f"no {name}" for name in missing), *(f"an input {name}" for name in unknown)])
        raise UnsupportedArchitectureError(
            "the graph that optimum made has another layout than one past key and value of one shape a layer: "
            + (", ".join(told) or f"caches of the shapes {sorted(shapes, key=str)} and {n_vocab} logits")
        )
    n_kv_head, head_dim = next(iter(shapes))
    return GraphShape(len(layers), int(n_kv_head), int(head_dim), n_vocab)


def _dims(value: onnx.ValueInfoProto) -> list[int | str]:
    return [dim.dim_value or dim.dim_param for dim in value.type.tensor_type.shape.dim]


class _Writer:
    """Rewrites a graph in place and fills its weights file."""

    def __init__(
        self,
        model: onnx.ModelProto,
        folder: Path,
        file: BinaryIO,
        *,
        file_name: str,
        recipe: Recipe,
        threads: int | None,
        progress: ByteProgress | None,
    ) -> None:
        import onnx

        self.onnx = onnx
        self.graph = model.graph
        self.folder = folder
        self.file = file
        self.file_name = file_name
        self.recipe = recipe
        self.threads = threads or os.cpu_count() or 1
        self.progress = progress
        self.weight_bytes = 0
        self.end = 0
        self.done = 0
        self.tensors = {tensor.name: tensor for tensor in self.graph.initializer}
        self.total = sum(_n_bytes(tensor) for tensor in self.graph.initializer)
        self.made_by = {name: node for node in self.graph.node for name in node.output}
        self.stored: dict[tuple[str, bool], list[str]] = {}
        self.initializers: list[onnx.TensorProto] = []

    def rewrite(self) -> None:
        """Quantise what can be, and carry everything else over."""
        self._pick_rows()
        nodes: list[Any] = []
        for node in self.graph.node:
            nodes += self._product(node) or self._lookup(node) or [node]
        used = self._drop_unused(nodes)
        del self.graph.node[:]
        self.graph.node.extend(nodes)
        for tensor in self.graph.initializer:
            if tensor.name in used:
                self._carry_over(tensor)
        del self.graph.initializer[:]
        self.graph.initializer.extend(self.initializers)
        if self.progress is not None:
            self.progress(self.total, self.total)

    def _drop_unused(self, nodes: list[Any]) -> set[str]:
        """Take copies and transpositions away that nothing reads any more; returns the names that are read."""
        while True:
            used = {name for node in nodes for name in node.input} | {value.name for value in self.graph.output}
            kept = [n for n in nodes if n.op_type not in _COPIES or used & set(n.output)]
            if len(kept) == len(nodes):
                return used
            nodes[:] = kept

    def _pick_rows(self) -> None:
        """Let the head see the positions in `rows` alone, where it is a product with a constant matrix."""
        name = "logits"
        while (node := self.made_by.get(name)) is not None and node.op_type in _KEEPS_ROWS:
            variable = [i for i in node.input if i not in self.tensors and not self._is_number(i)]
            if len(variable) != 1:
                return
            name = variable[0]
        if node is None or node.op_type != "MatMul" or self._constant(node.input[1]) is None:
            return
        helper = self.onnx.helper
        picked = helper.make_node("Gather", [node.input[0], ROWS], ["head_rows"], name="head_rows", axis=1)
        node.input[0] = "head_rows"
        at = next(i for i, other in enumerate(self.graph.node) if other.output[0] == node.output[0])
        self.graph.node.insert(at, picked)
        self.graph.input.append(helper.make_tensor_value_info(ROWS, self.onnx.TensorProto.INT64, [ROWS]))
        logits = next(value for value in self.graph.output if value.name == "logits")
        logits.type.tensor_type.shape.dim[1].dim_param = ROWS

    def _is_number(self, name: str) -> bool:
        node = self.made_by.get(name)
        return node is not None and node.op_type == "Constant"

    def _constant(self, name: str, *, transposed: bool = False) -> _Constant | None:
        """The float matrix behind a name, through copies and transpositions; None where it is none."""
        while name not in self.tensors:
            node = self.made_by.get(name)
            if node is None or node.op_type not in _COPIES:
                return None
            if node.op_type == "Transpose":
                order = next((list(a.ints) for a in node.attribute if a.name == "perm"), [1, 0])
                if order != [1, 0]:
                    return None
                transposed = not transposed
            name = node.input[0]
        tensor = self.tensors[name]
        kind = self.onnx.TensorProto.FLOAT
        return _Constant(tensor, transposed) if tensor.data_type == kind and len(tensor.dims) == 2 else None

    def _product(self, node: Any) -> list[Any] | None:
        """The quantised form of a product with a constant matrix; None where the node is none, or has to stay."""
        if node.op_type not in ("MatMul", "Gemm"):
            return None
        attributes = {a.name: self.onnx.helper.get_attribute_value(a) for a in node.attribute}
        plain = attributes.get("alpha", 1.0) == attributes.get("beta", 1.0) == 1.0 and not attributes.get("transA", 0)
        constant = self._constant(node.input[1], transposed=bool(attributes.get("transB", 0)))
        if not plain or constant is None:
            return None
        k, n = constant.shape
        try:
            block = self.recipe.block_for(k)
        except UsageError:
            return None
        bias = node.input[2] if len(node.input) > 2 else ""
        output = f"{node.output[0]}.product" if bias else node.output[0]
        made = [
            self.onnx.helper.make_node(
                "MatMulNBits",
                [node.input[0], *self._quantized(constant, block)],
                [output],
                name=node.name,
                domain=_MS,
                K=k,
                N=n,
                bits=self.recipe.bits,
                block_size=block,
                accuracy_level=4,  # int8 activations: the integer dot products that make several rows cheap
            )
        ]
        if bias:
            made.append(self.onnx.helper.make_node("Add", [output, bias], list(node.output), name=f"{node.name}.bias"))
        return made

    def _lookup(self, node: Any) -> list[Any] | None:
        """A lookup in a table of float16 that becomes float32; None where the node is none, or values do not fit."""
        if node.op_type != "Gather" or any(a.i for a in node.attribute if a.name == "axis"):
            return None
        constant = self._constant(node.input[0])
        if constant is None or constant.transposed or _n_bytes(constant.tensor) <= _INLINE_BYTES:
            return None
        name = f"{constant.tensor.name}.half"
        if (name, False) not in self.stored:
            values = self._values(constant.tensor)
            if np.abs(values).max(initial=0) > np.finfo(np.float16).max:
                return None
            self._store(name, self.onnx.TensorProto.FLOAT16, list(values.shape), values.astype(np.float16))
            self.stored[name, False] = [name]
            self._report(_n_bytes(constant.tensor))
        found = f"{node.output[0]}.half"
        look = self.onnx.helper.make_node("Gather", [name, node.input[1]], [found], name=node.name)
        widen = self.onnx.helper.make_node(
            "Cast", [found], list(node.output), name=f"{node.name}.widen", to=self.onnx.TensorProto.FLOAT
        )
        return [look, widen]

    def _quantized(self, constant: _Constant, block: int) -> list[str]:
        """Names of a matrix's packed weights, scales and perhaps zero points, which are stored once."""
        key = (constant.tensor.name, constant.transposed)
        if key not in self.stored:
            (k, n), bits, kind = constant.shape, self.recipe.bits, self.onnx.TensorProto
            name = f"{constant.tensor.name}{'.t' if constant.transposed else ''}.q"
            places = [(name, kind.UINT8, [n, k // block, block * bits // 8])]
            places.append((f"{name}.scales", kind.FLOAT, [n, k // block]))
            if self.recipe.zero_points:
                places.append((f"{name}.zeros", kind.UINT8, [n, -(-(k // block) * bits // 8)]))
            offsets = [self._declare(*place) for place in places]
            self._fill(constant, block, offsets)
            self.weight_bytes += sum(int(np.prod(dims)) * (4 if t == kind.FLOAT else 1) for _, t, dims in places)
            self.stored[key] = [place[0] for place in places]
        return self.stored[key]

    def _fill(self, constant: _Constant, block: int, offsets: list[int]) -> None:
        """Quantise a matrix some rows at a time on each thread, each into its place in the file."""
        values = self._values(constant.tensor)
        rows_of = values if constant.transposed else values.T
        n, k = rows_of.shape
        lock, bits = Lock(), self.recipe.bits

        def turn(rows: slice) -> None:
            part = np.ascontiguousarray(rows_of[rows])
            if not np.isfinite(part).all():
                raise ModelFormatError(f"the tensor {constant.tensor.name} holds values that are not finite")
            quantized = quantize_rows(part, bits=bits, block=block, zero_points=self.recipe.zero_points)
            stored: list[NDArray[Any]] = [quantized.packed, quantized.scales]
            if quantized.zeros is not None:
                stored.append(pack_zeros(quantized.zeros, bits))
            with lock:
                for offset, array in zip(offsets, stored, strict=True):
                    self.file.seek(offset + rows.start * (array.nbytes // len(array)))
                    self.file.write(np.ascontiguousarray(array).data)
                self._report(4 * k * len(part))

        with ThreadPoolExecutor(self.threads) as pool:
            list(pool.map(turn, _chunks(n, k)))

    def _carry_over(self, tensor: onnx.TensorProto) -> None:
        """Keep an initializer as it is: inside the graph if it is small, else in the weights file."""
        n_bytes = _n_bytes(tensor)
        values = self._values(tensor)
        if n_bytes <= _INLINE_BYTES:
            self.initializers.append(self.onnx.numpy_helper.from_array(values, tensor.name))
        else:
            self._store(tensor.name, tensor.data_type, list(tensor.dims), values)
        self._report(n_bytes)

    def _store(self, name: str, kind: int, dims: list[int], values: NDArray[Any]) -> None:
        self.file.seek(self._declare(name, kind, dims))
        self.file.write(np.ascontiguousarray(values).data)

    def _declare(self, name: str, kind: int, dims: list[int]) -> int:
        """An initializer whose bytes lie in the weights file; returns their place."""
        offset = -(-self.end // ALIGNMENT) * ALIGNMENT
        dtype = self.onnx.helper.tensor_dtype_to_np_dtype(kind)
        length = int(np.prod(dims)) * dtype.itemsize
        tensor = self.onnx.TensorProto(name=name, data_type=kind, dims=dims)
        tensor.data_location = self.onnx.TensorProto.EXTERNAL
        for key, value in (("location", self.file_name), ("offset", offset), ("length", length)):
            tensor.external_data.add(key=key, value=str(value))
        self.initializers.append(tensor)
        self.end = offset + length
        return offset

    def _values(self, tensor: onnx.TensorProto) -> NDArray[Any]:
        """An initializer's values, mapped where they lie in a file of their own."""
        if tensor.data_location != self.onnx.TensorProto.EXTERNAL:
            return np.asarray(self.onnx.numpy_helper.to_array(tensor))
        place = {entry.key: entry.value for entry in tensor.external_data}
        path = self.folder / Path(place["location"]).name
        dtype = self.onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
        try:
            flat = np.memmap(path, dtype, "r", int(place.get("offset", 0)), (int(np.prod(tensor.dims)),))
        except (OSError, ValueError) as exc:
            raise ModelFormatError(f"{path}: the tensor {tensor.name} cannot be read ({exc})") from exc
        return flat.reshape(tuple(tensor.dims))

    def _report(self, n_bytes: int) -> None:
        self.done += n_bytes
        if self.progress is not None:
            self.progress(min(self.done, self.total), self.total)


def _n_bytes(tensor: onnx.TensorProto) -> int:
    """Bytes of an initializer, taking four for a value: enough to show how far the work is."""
    return 4 * int(np.prod(tensor.dims, dtype=np.int64))


def _chunks(n_rows: int, row_length: int) -> Iterator[slice]:
    step = max(1, CHUNK_WEIGHTS // row_length)
    return (slice(start, min(start + step, n_rows)) for start in range(0, n_rows, step))
