"""The ONNX graph of a decoder, from fused operators of ONNX Runtime (com.microsoft).

Inputs (S new tokens, R rows, C cached positions):
  embeddings            float32 [1, S, hidden]      rows of the embedding table, looked up by the caller
  rows                  int64   [R]                 which of the S positions get logits
  seqlens_k             int32   [1]                 length of the sequence after this pass, less one
  total_sequence_length int32   []                  that length
  cos, sin              float32 [C, rope_dim/2]     rotary tables, and cos.local, sin.local where windowed layers
                                                    have others
  past_key.L, past_value.L   float32 [1, n_kv_head, C, head_dim]
and where the head is trimmed
  reached               float32 [hidden, A]         rows of the whole head, turned, of tokens that the trimmed one lacks
  reached_bias          float32 [A]                 added to their logits: 0, or minus infinity where there is no token
Outputs:
  logits                float32 [1, R, V]           V: rows of the head
  key.L, value.L        as past_*; bound to the same memory, so that the cache is written in place
and where the head is trimmed (then V counts its rows and behind them the A reached ones)
  top_logits, top_places   float32, int64 [1, R, K] the largest logits of a row, falling, and where in V they are
  log_sum               float32 [1, R, 1]           the logarithm of the sum of exp over V
  hidden                float32 [1, R, hidden]      what the head is applied to

The last layer works on the R rows alone once its attention is done: nothing later needs the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edge_spec.export.architecture import DecoderConfig
from edge_spec.types import TOP_K

if TYPE_CHECKING:
    import onnx

MS = "com.microsoft"
HEAD = "output"
"""The projection that makes logits."""


@dataclass(frozen=True, slots=True)
class Span:
    """Where an initializer lies in the weights file: offset and length in bytes."""

    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class StoredMatrix:
    """A quantised matrix [n_rows, row_length] in the weights file."""

    n_rows: int
    row_length: int
    bits: int
    block: int
    packed: Span
    scales: Span
    zeros: Span | None = None


@dataclass(frozen=True, slots=True)
class Weights:
    """Everything that the graph refers to. A projection of several parts (query, key, value) is a list of matrices
    that follow each other: one where they could be fused."""

    matrices: dict[str, list[StoredMatrix]]
    vectors: dict[str, NDArray[np.float32]]


def build_graph(config: DecoderConfig, weights: Weights, *, weights_file: str) -> onnx.ModelProto:
    """The decoder's graph; matrices stay in `weights_file` (beside the model), vectors are embedded."""
    return _Builder(config, weights, weights_file).build()


class _Builder:
    def __init__(self, config: DecoderConfig, weights: Weights, weights_file: str) -> None:
        import onnx

        self.onnx = onnx
        self.config = config
        self.weights = weights
        self.weights_file = weights_file
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.head_rows = sum(part.n_rows for part in weights.matrices[HEAD])
        self.trimmed = self.head_rows < config.n_vocab
        self.top_k = min(TOP_K, self.head_rows)

    def build(self) -> onnx.ModelProto:
        onnx, config = self.onnx, self.config
        for name, vector in self.weights.vectors.items():
            self.initializers.append(onnx.numpy_helper.from_array(vector, name))
        # `residual` runs through the layers; each norm adds the branch before it and hands the sum on.
        residual, branch = "embeddings", None
        if config.embedding_scale != 1:
            residual = self.scale(residual, config.embedding_scale, "embeddings.scaled")
        for layer in range(config.n_layer):
            block = f"blk.{layer}."
            normed, residual = self.norm(block + "attn_norm", residual, branch)
            branch = self.attention(layer, normed)
            if layer == config.n_layer - 1:
                branch = self.op("Gather", [branch, "rows"], block + "attention_rows", axis=1)
                residual = self.op("Gather", [residual, "rows"], block + "residual_rows", axis=1)
            branch = self.post_norm(block + "post_attention_norm", self.project(block + "attn_output", branch))
            normed, residual = self.norm(block + "ffn_norm", residual, branch)
            branch = self.post_norm(block + "post_ffw_norm", self.feed_forward(block, normed))
        normed, _ = self.norm("output_norm", residual, branch)
        self.logits(normed)
        if self.trimmed:
            self.top()
            self.op("Identity", [normed], "hidden")
        graph = onnx.helper.make_graph(
            self.nodes, config.architecture, self.inputs(), self.outputs(), initializer=self.initializers
        )
        opsets = [onnx.helper.make_opsetid("", 18), onnx.helper.make_opsetid(MS, 1)]
        return onnx.helper.make_model(graph, opset_imports=opsets, ir_version=9, producer_name="edge_spec")

    def attention(self, layer: int, normed: str) -> str:
        config, block = self.config, f"blk.{layer}."
        qkv = self.project(block + "attn_qkv", normed)
        sources = self.normed_heads(block, qkv) if config.traits.qk_norm else [qkv, "", ""]
        past = [f"past_key.{layer}", f"past_value.{layer}"]
        tables = config.rope_of(layer)
        optional = {
            "scale": config.attention_scale,
            "softcap": config.attention_softcap,
            "local_window_size": config.window(layer),
        }
        return self.op(
            "GroupQueryAttention",
            [*sources, *past, "seqlens_k", "total_sequence_length", *tables],
            block + "attention",
            more_outputs=[f"key.{layer}", f"value.{layer}"],
            domain=MS,
            num_heads=config.n_head,
            kv_num_heads=config.n_kv_head,
            do_rotary=int(bool(tables)),
            rotary_interleaved=int(config.rope_interleaved),
            **{name: value for name, value in optional.items() if value},
        )

    def normed_heads(self, block: str, qkv: str) -> list[str]:
        """Queries and keys, each head normed, and values, out of their one product."""
        heads = (self.config.n_head, self.config.n_kv_head, self.config.n_kv_head)
        widths = self.constant(f"{qkv}.widths", [n * self.config.head_dim for n in heads])
        query, key, value = (f"{block}attn_{part}" for part in "qkv")
        self.op("Split", [qkv, widths], query, [key, value], axis=-1)
        return [self.normed_head(query, heads[0]), self.normed_head(key, heads[1]), value]

    def normed_head(self, name: str, n_head: int) -> str:
        width = self.config.head_dim
        apart = self.constant(f"{name}.apart", [1, -1, n_head, width])
        joined = self.constant(f"{name}.joined", [1, -1, n_head * width])
        normed, _ = self.norm(f"{name}_norm", self.op("Reshape", [name, apart], f"{name}.by_head"), None)
        return self.op("Reshape", [normed, joined], f"{name}.normed")

    def feed_forward(self, block: str, normed: str) -> str:
        if self.config.traits.fused_inputs:
            both = self.project(block + "ffn_up", normed)
            gate, up = block + "ffn_gate", block + "ffn_up.half"
            self.op("Split", [both], gate, [up], axis=-1, num_outputs=2)
        else:
            gate = self.project(block + "ffn_gate", normed)
            up = self.project(block + "ffn_up", normed)
        return self.project(block + "ffn_down", self.op("Mul", [self.activate(block, gate), up], block + "ffn_gated"))

    def activate(self, block: str, gate: str) -> str:
        if self.config.traits.activation == "gelu_tanh":
            return self.op("FastGelu", [gate], block + "ffn_gelu", domain=MS)
        sigmoid = self.op("Sigmoid", [gate], block + "ffn_sigmoid")
        return self.op("Mul", [gate, sigmoid], block + "ffn_silu")

    def logits(self, normed: str) -> str:
        """The head, and the rows that are reached beside a trimmed one."""
        if not self.trimmed:
            return self.bounded(lambda output: self.project(HEAD, normed, output), "logits")
        head = self.bounded(lambda output: self.project(HEAD, normed, output), "head")
        reached = self.bounded(lambda output: self.op("MatMul", [normed, "reached"], output), "reached.logits")
        present = self.op("Add", [reached, "reached_bias"], "reached.present")
        return self.op("Concat", [head, present], "logits", axis=-1)

    def bounded(self, score: Callable[[str], str], output: str) -> str:
        """Logits, which `score` computes under a name, within their bound if there is one: cap * tanh(l / cap)."""
        cap = self.config.logit_softcap
        if not cap:
            return score(output)
        in_caps = self.scale(score(f"{output}.unbounded"), 1 / cap, f"{output}.in_caps")
        return self.scale(self.op("Tanh", [in_caps], f"{output}.bounded"), cap, output)

    def top(self) -> None:
        """Of each row of logits what drafting needs, while they are in the processor's caches."""
        self.op("TopK", ["logits", self.constant("top_k", [self.top_k])], "top_logits", ["top_places"])
        best = self.op("Gather", ["top_logits", self.constant("top_k.first", [0])], "top_logits.first", axis=-1)
        shares = self.op("Exp", [self.op("Sub", ["logits", best], "logits.below_best")], "logits.shares")
        total = self.op("ReduceSum", [shares, self.constant("logits.axes", [-1])], "logits.share_sum")
        self.op("Add", [self.op("Log", [total], "log_sum.above_best"), best], "log_sum")

    def scale(self, x: str, factor: float, output: str) -> str:
        """x times a number."""
        return self.op("Mul", [x, self.constant(f"{output}.factor", factor)], output)

    def post_norm(self, name: str, branch: str) -> str:
        """RMS norm of a branch before it joins the residual stream, in architectures that have it."""
        return self.norm(name, branch, None)[0] if self.config.traits.post_norms else branch

    def norm(self, name: str, residual: str, branch: str | None) -> tuple[str, str]:
        """RMS norm of residual + branch; returns the normed value and the sum."""
        epsilon, gamma, out = self.config.rms_epsilon, f"{name}.weight", f"{name}.out"
        if branch is None:
            inputs = [residual, gamma]
            return self.op(
                "SimplifiedLayerNormalization", inputs, out, axis=-1, epsilon=epsilon, stash_type=1
            ), residual
        inputs, total = [residual, branch, gamma], f"{name}.sum"
        self.op("SkipSimplifiedLayerNormalization", inputs, out, ["", "", total], domain=MS, epsilon=epsilon)
        return out, total

    def project(self, name: str, x: str, output: str | None = None) -> str:
        """x times the transpose of the named matrix, plus its bias if it has one."""
        bias = f"{name}.bias" if f"{name}.bias" in self.weights.vectors else None
        output = output or f"{name}.out"
        product = f"{name}.product" if bias else output
        parts = self.weights.matrices[name]
        if len(parts) == 1:
            self.multiply(f"{name}.weight", x, parts[0], product)
        else:
            pieces = [self.multiply(f"{name}.{i}.weight", x, part, f"{product}.{i}") for i, part in enumerate(parts)]
            self.op("Concat", pieces, product, axis=-1)
        return self.op("Add", [product, bias], output) if bias else output

    def multiply(self, name: str, x: str, matrix: StoredMatrix, output: str) -> str:
        blocks = matrix.row_length // matrix.block
        packed_shape = [matrix.n_rows, blocks, matrix.block * matrix.bits // 8]
        self.store(name, self.onnx.TensorProto.UINT8, packed_shape, matrix.packed)
        self.store(f"{name}.scales", self.onnx.TensorProto.FLOAT, [matrix.n_rows, blocks], matrix.scales)
        inputs = [x, name, f"{name}.scales"]
        if matrix.zeros is not None:
            row_bytes = matrix.zeros.length // matrix.n_rows
            self.store(f"{name}.zeros", self.onnx.TensorProto.UINT8, [matrix.n_rows, row_bytes], matrix.zeros)
            inputs.append(f"{name}.zeros")
        return self.op(
            "MatMulNBits",
            inputs,
            output,
            domain=MS,
            N=matrix.n_rows,
            K=matrix.row_length,
            bits=matrix.bits,
            block_size=matrix.block,
            accuracy_level=4,  # int8 activations: the integer dot products that make several rows cheap
        )

    def constant(self, name: str, value: float | list[int]) -> str:
        """A number, float32, or a shape, int64, inside the graph."""
        array = np.array(value, np.int64 if isinstance(value, list) else np.float32)
        self.initializers.append(self.onnx.numpy_helper.from_array(array, name))
        return name

    def store(self, name: str, kind: int, shape: Sequence[int], span: Span) -> None:
        """Declare an initializer whose bytes lie in the weights file."""
        tensor = self.onnx.TensorProto(name=name, data_type=kind, dims=shape)
        tensor.data_location = self.onnx.TensorProto.EXTERNAL
        for key, value in (("location", self.weights_file), ("offset", span.offset), ("length", span.length)):
            tensor.external_data.add(key=key, value=str(value))
        self.initializers.append(tensor)

    def op(
        self,
        kind: str,
        inputs: Sequence[str],
        output: str,
        more_outputs: Sequence[str] = (),
        domain: str = "",
        **attributes: Any,
    ) -> str:
        node = self.onnx.helper.make_node(
            kind, inputs, [output, *more_outputs], name=output, domain=domain or None, **attributes
        )
        self.nodes.append(node)
        return output

    def inputs(self) -> list[onnx.ValueInfoProto]:
        config, value = self.config, self.value
        f32, i32, i64 = (getattr(self.onnx.TensorProto, kind) for kind in ("FLOAT", "INT32", "INT64"))
        table: list[int | str] = ["n_ctx", config.rope_dim // 2]
        return [
            value("embeddings", f32, [1, "tokens", config.hidden]),
            value("rows", i64, ["rows"]),
            value("seqlens_k", i32, [1]),
            value("total_sequence_length", i32, []),
            *(value(name, f32, table) for name in config.rope_names),
            *self.caches("past_key", "past_value"),
            *(self.reached() if self.trimmed else []),
        ]

    def reached(self) -> list[onnx.ValueInfoProto]:
        f32 = self.onnx.TensorProto.FLOAT
        shapes: dict[str, list[int | str]] = {"reached": [self.config.hidden, "reached"], "reached_bias": ["reached"]}
        return [self.value(name, f32, shape) for name, shape in shapes.items()]

    def outputs(self) -> list[onnx.ValueInfoProto]:
        f32, i64 = self.onnx.TensorProto.FLOAT, self.onnx.TensorProto.INT64
        found: list[tuple[str, int, int | str]] = [("logits", f32, "scored" if self.trimmed else self.head_rows)]
        if self.trimmed:
            found += [("top_logits", f32, self.top_k), ("top_places", i64, self.top_k), ("log_sum", f32, 1)]
            found.append(("hidden", f32, self.config.hidden))
        return [*(self.value(name, kind, [1, "rows", n]) for name, kind, n in found), *self.caches("key", "value")]

    def caches(self, *names: str) -> list[onnx.ValueInfoProto]:
        shape: list[int | str] = [1, self.config.n_kv_head, "n_ctx", self.config.head_dim]
        f32 = self.onnx.TensorProto.FLOAT
        return [self.value(f"{name}.{layer}", f32, shape) for layer in range(self.config.n_layer) for name in names]

    def value(self, name: str, kind: int, shape: Sequence[int | str]) -> onnx.ValueInfoProto:
        return self.onnx.helper.make_tensor_value_info(name, kind, shape)
