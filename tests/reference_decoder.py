"""A decoder's forward pass in plain NumPy, float64, from the tensors of a GGUF: what a graph is compared with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edge_spec.formats.gguf import GGUFFile

Array = NDArray[np.float64]


def reference_logits(path: Path, tokens: list[int], stored: Callable[[Array], Array] = lambda matrix: matrix) -> Array:
    """Logits of every position, shape [len(tokens), n_vocab], of a llama or qwen2 model.

    `stored` makes of each projection's matrix what an export would make of it.
    """
    with GGUFFile(path) as gguf:
        return _forward(gguf, tokens, stored)


def _forward(gguf: GGUFFile, tokens: list[int], stored: Callable[[Array], Array]) -> Array:
    def tensor(name: str) -> Array:
        return gguf.dequantize(name).astype(np.float64)

    def project(name: str, x: Array) -> Array:
        y: Array = x @ stored(tensor(f"{name}.weight")).T
        return y + tensor(f"{name}.bias") if f"{name}.bias" in gguf.tensors else y

    def norm(name: str, x: Array) -> Array:
        epsilon = gguf.hparam_float("attention.layer_norm_rms_epsilon")
        scale: Array = np.sqrt((x * x).mean(-1, keepdims=True) + epsilon)
        return x / scale * tensor(f"{name}.weight")

    n_head, n_kv_head = gguf.hparam_int("attention.head_count"), gguf.hparam_int("attention.head_count_kv")
    head_dim = gguf.hparam_int("embedding_length") // n_head
    x = tensor("token_embd.weight")[tokens]
    n = len(tokens)
    for layer in range(gguf.hparam_int("block_count")):
        block = f"blk.{layer}."
        normed = norm(block + "attn_norm", x)
        q, k, v = (project(f"{block}attn_{part}", normed).reshape(n, -1, head_dim) for part in "qkv")
        q, k = (_rotate(part, gguf.hparam_float("rope.freq_base"), gguf.architecture == "llama") for part in (q, k))
        k, v = (np.repeat(part, n_head // n_kv_head, axis=1) for part in (k, v))
        scores = np.einsum("ihd,jhd->hij", q, k) / np.sqrt(head_dim)
        scores[:, np.triu(np.ones((n, n), bool), 1)] = -np.inf
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = np.einsum("hij,jhd->ihd", weights / weights.sum(-1, keepdims=True), v)
        x = x + project(block + "attn_output", mixed.reshape(n, -1))
        normed = norm(block + "ffn_norm", x)
        gate = project(block + "ffn_gate", normed)
        x = x + project(block + "ffn_down", gate / (1 + np.exp(-gate)) * project(block + "ffn_up", normed))
    head = "output.weight" if "output.weight" in gguf.tensors else "token_embd.weight"
    return norm("output_norm", x) @ stored(tensor(head)).T


def _rotate(x: Array, base: float, adjacent: bool) -> Array:
    """Rotary embedding of [positions, heads, head_dim]; pairs are neighbours, or halves apart."""
    n, _, dim = x.shape
    angles = np.outer(np.arange(n), base ** (-np.arange(0, dim, 2) / dim))[:, None, :]
    first, second = (x[..., 0::2], x[..., 1::2]) if adjacent else (x[..., : dim // 2], x[..., dim // 2 :])
    turned = first * np.cos(angles) - second * np.sin(angles), first * np.sin(angles) + second * np.cos(angles)
    return np.stack(turned, -1).reshape(x.shape) if adjacent else np.concatenate(turned, -1)
