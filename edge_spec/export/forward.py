"""A decoder's layers in NumPy, float32: what the exporter shows to each matrix before it rounds it.

One layer at a time, so that no more than one layer's weights are in memory. The graph is the one that `graph` builds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edge_spec.export.architecture import DecoderConfig

Array = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class LayerPass:
    """What a layer made of some texts: `inputs` of each of its projections, float32 [tokens, row length], by the last
    part of their names; `output` [tokens, hidden]."""

    inputs: dict[str, Array]
    output: Array


class Forward:
    """Runs `texts` (lengths that sum to the tokens) through a decoder, each from its own first position.

    `vectors`: norms and biases by the graph's names.
    """

    def __init__(self, config: DecoderConfig, vectors: Mapping[str, Array], texts: Sequence[int]) -> None:
        self._config = config
        self._vectors = vectors
        ends = np.cumsum(texts).tolist()
        self._texts = [slice(end - length, end) for end, length in zip(ends, texts, strict=True)]
        longest = max(texts)
        self._tables = config.rope_inputs(longest, longest)

    def embed(self, rows: Array) -> Array:
        """What the first layer gets for these rows of the embedding table."""
        return rows * np.float32(self._config.embedding_scale)

    def layer(self, layer: int, x: Array, matrices: Mapping[str, Array]) -> LayerPass:
        """One layer; `matrices` by the last part of their names, float32 [rows, row length]."""
        traits, block = self._config.traits, f"blk.{layer}."
        inputs: dict[str, Array] = {}

        def project(name: str, value: Array) -> Array:
            inputs[name] = value
            bias = self._vectors.get(f"{block}{name}.bias")
            product = value @ matrices[name].T
            return product if bias is None else product + bias

        normed = self.norm(f"{block}attn_norm", x)
        mixed = self._attention(layer, project("attn_qkv", normed))
        branch = project("attn_output", mixed)
        x = x + (self.norm(f"{block}post_attention_norm", branch) if traits.post_norms else branch)
        normed = self.norm(f"{block}ffn_norm", x)
        up = project("ffn_up", normed)
        gate, up = np.split(up, 2, axis=-1) if traits.fused_inputs else (project("ffn_gate", normed), up)
        branch = project("ffn_down", _activate(gate, traits.activation) * up)
        return LayerPass(inputs, x + (self.norm(f"{block}post_ffw_norm", branch) if traits.post_norms else branch))

    def norm(self, name: str, x: Array) -> Array:
        """RMS norm over the last axis."""
        scale = np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + np.float32(self._config.rms_epsilon))
        return np.asarray(x / scale * self._vectors[f"{name}.weight"], np.float32)

    def _attention(self, layer: int, qkv: Array) -> Array:
        config = self._config
        ends = np.cumsum([config.n_head, config.n_kv_head]) * config.head_dim
        q, k, v = (part.reshape(len(qkv), -1, config.head_dim) for part in np.split(qkv, ends, axis=-1))
        if config.traits.qk_norm:
            q, k = (self.norm(f"blk.{layer}.attn_{part}_norm", x) for part, x in (("q", q), ("k", k)))
        mixed = [self._attend(layer, q[text], k[text], v[text]) for text in self._texts]
        return np.concatenate(mixed).reshape(len(qkv), -1)

    def _attend(self, layer: int, q: Array, k: Array, v: Array) -> Array:
        """Attention within one text; q [tokens, heads, head_dim], k and v with their fewer heads."""
        config, n = self._config, len(q)
        if names := config.rope_of(layer):
            cos, sin = (self._tables[name][:n, None, :] for name in names)
            q, k = (_rotate(x, cos, sin, config.rope_interleaved) for x in (q, k))
        group = config.n_head // config.n_kv_head
        q = q.reshape(n, config.n_kv_head, group, -1).transpose(1, 2, 0, 3)
        keys, values = k.transpose(1, 2, 0)[:, None], v.transpose(1, 0, 2)[:, None]
        scores = q @ keys * np.float32(config.attention_scale or config.head_dim**-0.5)
        if config.attention_softcap:
            scores = np.float32(config.attention_softcap) * np.tanh(scores / np.float32(config.attention_softcap))
        distance = np.arange(n)[:, None] - np.arange(n)
        scores[..., (distance < 0) | (distance >= (config.window(layer) or n))] = -np.inf
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        return np.asarray((weights @ values).transpose(2, 0, 1, 3), np.float32)


def _activate(gate: Array, kind: str) -> Array:
    if kind == "gelu_tanh":
        inner = np.float32(np.sqrt(2 / np.pi)) * (gate + np.float32(0.044715) * gate**3)
        return np.asarray(gate / 2 * (1 + np.tanh(inner)), np.float32)
    return np.asarray(gate / 2 * (1 + np.tanh(gate / 2)), np.float32)  # silu, without an overflow


def _rotate(x: Array, cos: Array, sin: Array, interleaved: bool) -> Array:
    """Rotary embedding of the first values of [tokens, heads, head_dim], as many as the tables have."""
    width = 2 * cos.shape[-1]
    turned, rest = x[..., :width], x[..., width:]
    if interleaved:
        first, second = turned[..., 0::2], turned[..., 1::2]
    else:
        first, second = turned[..., : width // 2], turned[..., width // 2 :]
    pair = first * cos - second * sin, first * sin + second * cos
    joined = np.stack(pair, -1).reshape(turned.shape) if interleaved else np.concatenate(pair, -1)
    return np.concatenate([joined, rest], axis=-1)
