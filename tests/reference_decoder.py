"""A decoder's forward pass in plain NumPy, float64, from the tensors of a GGUF: what a graph is compared with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edge_spec.formats.gguf import GGUFFile

Array = NDArray[np.float64]


def reference_logits(path: Path, tokens: list[int], stored: Callable[[Array], Array] = lambda matrix: matrix) -> Array:
    """Logits of every position, shape [len(tokens), n_vocab], of any of our architectures; no long-context scaling
    of the rotary embedding but a plain factor.

    `stored` makes of each projection's matrix what an export would make of it.
    """
    with GGUFFile(path) as gguf:
        return _Forward(gguf, stored).logits(tokens)


class _Forward:
    """Reads what it needs from the file as it goes, independently of the exporter."""

    def __init__(self, gguf: GGUFFile, stored: Callable[[Array], Array]) -> None:
        self.gguf = gguf
        self.stored = stored
        self.gemma = gguf.architecture.startswith("gemma")
        self.n_head = gguf.hparam_int("attention.head_count")
        self.n_kv_head = gguf.hparam_int("attention.head_count_kv")
        hidden = gguf.hparam_int("embedding_length")
        self.head_dim = gguf.hparam_int("attention.key_length", hidden // self.n_head)
        self.adjacent = gguf.architecture in {"llama", "smollm3", "mistral3"}

    def logits(self, tokens: list[int]) -> Array:
        x = self.tensor("token_embd.weight")[tokens]
        if self.gemma:
            x *= np.sqrt(x.shape[1])
        for layer in range(self.gguf.hparam_int("block_count")):
            block = f"blk.{layer}."
            mixed = self.attention(layer, self.norm(block + "attn_norm", x))
            x = x + self.norm(block + "post_attention_norm", self.project(block + "attn_output", mixed))
            x = x + self.norm(block + "post_ffw_norm", self.network(block, self.norm(block + "ffn_norm", x)))
        head = "output.weight" if "output.weight" in self.gguf.tensors else "token_embd.weight"
        logits: Array = self.norm("output_norm", x) @ self.stored(self.tensor(head)).T
        return _capped(logits, self.cap("final_logit_softcapping"))

    def attention(self, layer: int, x: Array) -> Array:
        n, block = len(x), f"blk.{layer}."
        if f"{block}attn_qkv.weight" in self.gguf.tensors:
            ends = np.cumsum([self.n_head, self.n_kv_head]) * self.head_dim
            flat = np.split(self.project(block + "attn_qkv", x), ends, axis=-1)
        else:
            flat = [self.project(f"{block}attn_{part}", x) for part in "qkv"]
        q, k, v = (part.reshape(n, -1, self.head_dim) for part in flat)
        q, k = self.norm(block + "attn_q_norm", q), self.norm(block + "attn_k_norm", k)
        window = self.window(layer)
        if self.gguf.architecture != "smollm3" or layer % 4 != 3:
            q, k = self.rotate(q, bool(window)), self.rotate(k, bool(window))
        k, v = (np.repeat(part, self.n_head // self.n_kv_head, axis=1) for part in (k, v))
        scores = np.einsum("ihd,jhd->hij", q, k) / np.sqrt(self.head_dim)
        scores = _capped(scores, self.cap("attn_logit_softcapping"))
        distance = np.arange(n)[:, None] - np.arange(n)
        scores[:, (distance < 0) | (distance >= (window or n))] = -np.inf
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        mixed: Array = np.einsum("hij,jhd->ihd", weights / weights.sum(-1, keepdims=True), v)
        return mixed.reshape(n, -1)

    def window(self, layer: int) -> int:
        """Tokens that a layer sees; 0: all."""
        every = self.gguf.hparam_int("attention.sliding_window_pattern", 0)
        return self.gguf.hparam_int("attention.sliding_window") if every and layer % every != every - 1 else 0

    def rotate(self, x: Array, local: bool) -> Array:
        base, factor = self.gguf.hparam_float("rope.freq_base"), self.gguf.hparam_float("rope.scaling.factor", 1.0)
        if local and self.gguf.architecture == "gemma3":
            base, factor = 10000.0, 1.0
        return _rotate(x, base, factor, self.adjacent)

    def network(self, block: str, x: Array) -> Array:
        up = self.project(block + "ffn_up", x)
        if f"{block}ffn_gate.weight" in self.gguf.tensors:
            gate = self.project(block + "ffn_gate", x)
        else:
            gate, up = np.split(up, 2, axis=-1)
        if self.gemma:
            active = gate / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
        else:
            active = gate / (1 + np.exp(-gate))
        return self.project(block + "ffn_down", active * up)

    def tensor(self, name: str) -> Array:
        return self.gguf.dequantize(name).astype(np.float64)

    def project(self, name: str, x: Array) -> Array:
        y: Array = x @ self.stored(self.tensor(f"{name}.weight")).T
        return y + self.tensor(f"{name}.bias") if f"{name}.bias" in self.gguf.tensors else y

    def norm(self, name: str, x: Array) -> Array:
        """RMS norm over the last axis, where the file has this one."""
        if f"{name}.weight" not in self.gguf.tensors:
            return x
        scale: Array = np.sqrt((x * x).mean(-1, keepdims=True) + self.gguf.hparam_float(_EPSILON))
        return x / scale * self.tensor(f"{name}.weight")

    def cap(self, key: str) -> float:
        return self.gguf.hparam_float(key, 0.0)


_EPSILON = "attention.layer_norm_rms_epsilon"


def _capped(x: Array, cap: float) -> Array:
    return cap * np.tanh(x / cap) if cap else x


def _rotate(x: Array, base: float, factor: float, adjacent: bool) -> Array:
    """Rotary embedding of [positions, heads, head_dim]; pairs are neighbours, or halves apart."""
    n, _, dim = x.shape
    angles = np.outer(np.arange(n) / factor, base ** (-np.arange(0, dim, 2) / dim))[:, None, :]
    first, second = (x[..., 0::2], x[..., 1::2]) if adjacent else (x[..., : dim // 2], x[..., dim // 2 :])
    turned = first * np.cos(angles) - second * np.sin(angles), first * np.sin(angles) + second * np.cos(angles)
    return np.stack(turned, -1).reshape(x.shape) if adjacent else np.concatenate(turned, -1)
