"""The OpenVINO graph of an exported decoder, with paged attention.

Inputs (S new tokens, R rows, P blocks in the cache, B of them in use):
  embeddings            float32 [S, hidden]         rows of the embedding table, looked up by the caller
  rows                  int64   [R]                 which of the S positions get logits
  cos, sin              float32 [S, 1, head_dim]    rotary factors of the positions; sin carries the sign of its pair;
                                                    cos.local, sin.local where windowed layers have others
  past_lens             int32   [1]                 tokens cached before this pass
  subsequence_begins    int32   [2]                 0, S
  block_indices         int32   [B]                 the sequence's blocks in order
  block_indices_begins  int32   [2]                 0, B
  max_context_len       int32   []                  tokens cached after this pass
  key_cache.L, value_cache.L   [P, n_kv_head, 32, head_dim], of the element type that the model is compiled for;
                        owned by the caller, written in place
and where the head is trimmed: see `export.graph`
  reached               float32 [hidden, A]
  reached_bias          float32 [A]
Outputs:
  logits                float32 [R, V]              V: rows of the head, and where it is trimmed the A reached ones
and where the head is trimmed: see `export.graph`
  top_logits, top_places   float32, int64 [R, K]
  log_sum               float32 [R, 1]
  hidden                float32 [R, hidden]

The last layer works on the R rows alone once its attention is done: nothing later needs the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from edge_spec.export.architecture import DecoderConfig
from edge_spec.export.graph import HEAD, StoredMatrix, Weights
from edge_spec.export.quantize import pack_levels, unpack_levels
from edge_spec.types import TOP_K


def build_model(config: DecoderConfig, weights: Weights, mapped: NDArray[np.uint8]) -> Any:
    """An `openvino.Model` whose matrices lie in `mapped`, the weights file, which has to outlive it.

    `config` has to pass `_openvino_limits.check_expressible`.
    """
    return _Builder(config, weights, mapped).build()


def rotary_partners(config: DecoderConfig) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """For each dimension of a head its partner in rotation, int64 [head_dim], and the sign of the partner's sine,
    float32 [head_dim]: x turns into x * cos + x[partner] * (sign * sin). Dimensions that do not turn have sign 0.
    """
    partner = np.arange(config.head_dim)
    sign = np.zeros(config.head_dim, np.float32)
    first, second = config.rope_pairs
    partner[first], partner[second] = second, first
    sign[first], sign[second] = -1, 1
    return partner, sign


def rotary_factors(config: DecoderConfig, rows: int, n_ctx: int) -> dict[str, NDArray[np.float32]]:
    """The rotary inputs of `rows` positions, float32 [rows, 1, head_dim], for a cache of `n_ctx` tokens."""
    factors: dict[str, NDArray[np.float32]] = {}
    _, sign = rotary_partners(config)
    for name, table in config.rope_inputs(rows, n_ctx).items():
        is_cos = name.startswith("cos")
        factors[name] = np.full((rows, 1, config.head_dim), float(is_cos), np.float32)
        for dimensions in config.rope_pairs:
            factors[name][:, 0, dimensions] = table if is_cos else table * sign[dimensions]
    return factors


class _Builder:
    def __init__(self, config: DecoderConfig, weights: Weights, mapped: NDArray[np.uint8]) -> None:
        import openvino
        from openvino import opset13

        self.ov = openvino
        self.op = opset13
        self.config = config
        self.weights = weights
        self.mapped = mapped
        self.parameters: list[Any] = []

    def build(self) -> Any:
        op, config = self.op, self.config
        residual = self.parameter("embeddings", [-1, config.hidden], "f32")
        rows = self.parameter("rows", [-1], "i64")
        self.rotary = {name: self.parameter(name, [-1, 1, config.head_dim], "f32") for name in config.rope_names}
        self.partner = self.indices(rotary_partners(config)[0])
        shapes = {"past_lens": [-1], "subsequence_begins": [-1], "block_indices": [-1], "block_indices_begins": [-1]}
        self.paging = [self.parameter(name, shape, "i32") for name, shape in shapes.items()]
        self.max_context_len = self.parameter("max_context_len", [], "i32")
        if config.embedding_scale != 1:
            residual = op.multiply(residual, self.floats([[config.embedding_scale]]))
        for layer in range(config.n_layer):
            block = f"blk.{layer}."
            branch = self.attention(layer, self.norm(block + "attn_norm", residual))
            if layer == config.n_layer - 1:
                branch, residual = (op.gather(x, rows, self.indices(0)) for x in (branch, residual))
            branch = self.post_norm(block + "post_attention_norm", self.project(block + "attn_output", branch))
            residual = op.add(residual, branch)
            branch = self.feed_forward(block, self.norm(block + "ffn_norm", residual))
            residual = op.add(residual, self.post_norm(block + "post_ffw_norm", branch))
        normed = self.norm("output_norm", residual)
        outputs = self.scores(normed)
        for name, output in outputs.items():
            output.get_tensor().set_names({name})
        return self.ov.Model([op.result(output) for output in outputs.values()], self.parameters, config.architecture)

    def scores(self, normed: Any) -> dict[str, Any]:
        """The outputs, by their names."""
        op, head = self.op, self.bounded(self.project(HEAD, normed))
        n_rows = sum(part.n_rows for part in self.weights.matrices[HEAD])
        if n_rows == self.config.n_vocab:
            return {"logits": head.output(0)}
        rows = self.parameter("reached", [self.config.hidden, -1], "f32")
        bias = self.parameter("reached_bias", [-1], "f32")
        reached = op.add(self.bounded(op.matmul(normed, rows, False, False)), bias)
        logits = op.concat([head, reached], 1)
        k = self.indices(min(TOP_K, n_rows))
        largest, places = op.topk(logits, k, 1, "max", "value", index_element_type="i64").outputs()
        best = op.reduce_max(largest, self.indices([1]), keep_dims=True)
        shares = op.reduce_sum(op.exp(op.subtract(logits, best)), self.indices([1]), keep_dims=True)
        log_sum = op.add(op.log(shares), best)
        outputs = {"logits": logits, "hidden": normed, "log_sum": log_sum}
        return {name: node.output(0) for name, node in outputs.items()} | {"top_logits": largest, "top_places": places}

    def attention(self, layer: int, normed: Any) -> Any:
        config = self.config
        block = f"blk.{layer}."
        qkv = self.project(block + "attn_qkv", normed)
        queries, keys = config.n_head * config.head_dim, config.n_kv_head * config.head_dim
        if config.traits.qk_norm:
            query, key, value = self.split(qkv, [queries, keys, keys])
            query, key = (self.normed_heads(f"{block}attn_{name}_norm", x) for name, x in (("q", query), ("k", key)))
            query, key = self.rotate(layer, query), self.rotate(layer, key)
        else:
            turning, value = self.split(qkv, [queries + keys, keys])
            query, key = self.split(self.rotate(layer, turning), [queries, keys])
        caches = [self.parameter(f"{kind}_cache.{layer}", [-1, -1, -1, -1], "dynamic") for kind in ("key", "value")]
        inputs = [query, key, value, *(node.output(0) for node in (*caches, *self.paging, *self.options(layer)))]
        attention = self.ov.op._PagedAttentionExtension(inputs)
        info = attention.get_rt_info()
        for kind in "kv":
            info[f"num_{kind}_heads"] = config.n_kv_head
            info[f"{kind}_head_size"] = config.head_dim
        return attention.output(0)

    def options(self, layer: int) -> list[Any]:
        """The attention's inputs behind the blocks: scale, window, slopes, length, and what is switched off."""
        config, integers, floats, switch = self.config, self.integers([]), self.floats([]), self.integers(0)
        return [
            self.floats(config.attention_scale or config.head_dim**-0.5),
            self.integers(config.window(layer)),
            floats,  # no slopes by distance
            self.max_context_len,
            integers,  # no window over which scores are summed
            *(integers, integers, floats),  # cached keys are not turned again
            *(floats, switch, switch),  # no sparse attention
            self.floats(np.zeros((0, 0, 0, 0))),  # no sinks
            switch,  # no eviction by diversity: start, sizes, indices, their begins
            *(integers, integers, integers),
            integers,  # no token types
            *(self.constant(np.zeros(0, np.uint8)), integers),  # no bias among the queries
        ]

    def by_head(self, x: Any) -> Any:
        """[S, heads * head_dim] as [S, heads, head_dim]."""
        return self.op.reshape(x, self.indices([0, -1, self.config.head_dim]), special_zero=True)

    def joined(self, heads: Any) -> Any:
        return self.op.reshape(heads, self.indices([0, -1]), special_zero=True).output(0)

    def rotate(self, layer: int, x: Any) -> Any:
        """Rotary embedding of [S, heads * head_dim]."""
        op, names = self.op, self.config.rope_of(layer)
        if not names:
            return x
        cos, sin = (self.rotary[name] for name in names)
        heads = self.by_head(x)
        partners = op.gather(heads, self.partner, self.indices(2))
        return self.joined(op.add(op.multiply(heads, cos), op.multiply(partners, sin)))

    def normed_heads(self, name: str, x: Any) -> Any:
        """RMS norm of each head of [S, heads * head_dim]."""
        return self.joined(self.norm(name, self.by_head(x), axis=2))

    def feed_forward(self, block: str, normed: Any) -> Any:
        if self.config.traits.fused_inputs:
            both = self.project(block + "ffn_up", normed)
            gate, up = self.split(both, [self.config.n_ff, self.config.n_ff])
        else:
            gate, up = self.project(block + "ffn_gate", normed), self.project(block + "ffn_up", normed)
        activated = self.op.swish(gate) if self.config.traits.activation == "silu" else self.op.gelu(gate, "tanh")
        return self.project(block + "ffn_down", self.op.multiply(activated, up))

    def bounded(self, logits: Any) -> Any:
        """Logits l as cap * tanh(l / cap), where they have a cap."""
        op, cap = self.op, self.config.logit_softcap
        if not cap:
            return logits
        return op.multiply(op.tanh(op.multiply(logits, self.floats([[1 / cap]]))), self.floats([[cap]]))

    def post_norm(self, name: str, branch: Any) -> Any:
        """RMS norm of a branch before it joins the residual stream, in architectures that have it."""
        return self.norm(name, branch) if self.config.traits.post_norms else branch

    def norm(self, name: str, x: Any, axis: int = 1) -> Any:
        """RMS norm over the last axis, in the form that the plugin fuses."""
        op, ones = self.op, (1,) * axis
        mean = op.reduce_mean(op.power(x, self.full(ones, 2)), self.indices([axis]), keep_dims=True)
        root = op.sqrt(op.add(mean, self.full(ones, self.config.rms_epsilon)))
        normed = op.multiply(x, op.divide(self.full(ones, 1), root))
        return op.multiply(normed, self.floats(self.weights.vectors[f"{name}.weight"].reshape(*ones, -1)))

    def project(self, name: str, x: Any) -> Any:
        """x times the transpose of the named matrix, plus its bias if it has one."""
        op = self.op
        pieces = [op.matmul(x, self.matrix(part), False, True) for part in self.weights.matrices[name]]
        product = pieces[0] if len(pieces) == 1 else op.concat(pieces, 1)
        bias = self.weights.vectors.get(f"{name}.bias")
        return product if bias is None else op.add(product, self.floats(bias[None]))

    def split(self, x: Any, widths: list[int]) -> Any:
        return self.op.variadic_split(x, self.indices(1), self.indices(widths)).outputs()

    def matrix(self, stored: StoredMatrix) -> Any:
        """Weights [N, K] as the chain of operators that the plugin recognises and multiplies without unpacking."""
        op = self.op
        n, blocks = stored.n_rows, stored.row_length // stored.block
        kind = self.ov.Type.u4 if stored.bits == 4 else self.ov.Type.u8
        packed = self.mapped[stored.packed.offset :][: stored.packed.length]
        levels = self.shared(packed, kind, [n, blocks, stored.block])
        scales = self.mapped[stored.scales.offset :][: stored.scales.length].view(np.float32)
        scale = self.shared(scales, self.ov.Type.f32, [n, blocks, 1])
        centred = op.subtract(op.convert(levels, "f32"), op.convert(self.zeros(stored, kind), "f32"))
        return op.reshape(op.multiply(centred, scale), self.indices([n, stored.row_length]), False)

    def zeros(self, stored: StoredMatrix, kind: Any) -> Any:
        """The levels that stand for 0: one of each block, [N, blocks, 1], or one of all, [1, 1, 1]."""
        if stored.zeros is None:
            return self.ov.op.Constant(kind, self.ov.Shape([1, 1, 1]), [1 << (stored.bits - 1)])
        n, blocks = stored.n_rows, stored.row_length // stored.block
        packed = self.mapped[stored.zeros.offset :][: stored.zeros.length]
        if blocks * stored.bits % 8 == 0:
            return self.shared(packed, kind, [n, blocks, 1])
        # Each row of the file ends on a whole byte; a constant's rows follow each other nibble by nibble.
        levels = unpack_levels(packed.reshape(n, -1), stored.bits)[:, :blocks]
        joined = pack_levels(np.pad(levels.ravel(), (0, levels.size % 2)), stored.bits)
        tensor = self.ov.Tensor(joined, self.ov.Shape([n, blocks, 1]), kind)
        return self.ov.op.Constant(tensor, shared_memory=False)

    def shared(self, values: NDArray[Any], kind: Any, shape: Sequence[int]) -> Any:
        """A constant in the mapped file's own memory."""
        tensor = self.ov.Tensor(values, self.ov.Shape(shape), kind)
        return self.ov.op.Constant(tensor, shared_memory=True)

    def indices(self, values: ArrayLike) -> Any:
        return self.constant(np.asarray(values, np.int64))

    def integers(self, values: ArrayLike) -> Any:
        return self.constant(np.asarray(values, np.int32))

    def floats(self, values: ArrayLike) -> Any:
        return self.constant(np.asarray(values, np.float32))

    def full(self, leading: tuple[int, ...], value: float) -> Any:
        """A number of as many axes as what it is combined with: `leading`, and one more."""
        return self.floats(np.full((*leading, 1), value))

    def constant(self, values: NDArray[Any]) -> Any:
        return self.ov.op.Constant(values)

    def parameter(self, name: str, shape: Sequence[int], kind: str) -> Any:
        parameter = self.ov.op.Parameter(getattr(self.ov.Type, kind), self.ov.PartialShape(list(shape)))
        parameter.set_friendly_name(name)
        parameter.output(0).get_tensor().set_names({name})
        self.parameters.append(parameter)
        return parameter
