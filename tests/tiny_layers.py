"""Tiny random models that no plain decoder is: mixtures of experts, latent attention, recurrent layers and hybrids.

llama.cpp runs them; the exporter refuses them. Names and shapes are those that llama.cpp's `src/models/*.cpp` ask for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tests.tiny_models import vocabulary_metadata, write_random_gguf

Shapes = Iterator[tuple[str, tuple[int, ...]]]


class Sizes(NamedTuple):
    """What every one of them has."""

    n_layer: int = 2
    hidden: int = 256
    n_vocab: int = 512
    n_ctx: int = 512
    ff: int = 256
    n_head: int = 4
    n_kv_head: int = 2
    n_expert: int = 4

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.hidden // self.n_head

    @property
    def inner(self) -> int:
        """Width of a recurrent layer."""
        return 2 * self.hidden


class Kind(NamedTuple):
    """How an architecture's layers look: its keys (without its name) and the tensors of a layer."""

    metadata: Callable[[Sizes], Mapping[str, Any]]
    tensors: Callable[[Sizes, int], Shapes]
    final_norm: str = "output_norm"


_CONV, _STATE, _STEP_RANK, _SHORT_CONV = 4, 16, 32, 3
_ROPE, _NOPE, _RANK = 32, 64, 256


def write_layered_gguf(path: Path, architecture: str, *, tensor_type: str = "F16", seed: int = 0, **sizes: int) -> Path:
    """Write a model of one of KINDS. `sizes` are fields of `Sizes`; its matrices are of `tensor_type` where llama.cpp
    takes that."""
    kind, size = KINDS[architecture], Sizes(**sizes)
    tokens, vocabulary = vocabulary_metadata(size.n_vocab)
    keys = {
        "block_count": size.n_layer,
        "context_length": size.n_ctx,
        "embedding_length": size.hidden,
        "feed_forward_length": size.ff,
        "attention.head_count": size.n_head,
        "attention.head_count_kv": size.n_kv_head,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": 10000.0,
        "vocab_size": len(tokens),
        **kind.metadata(size),
    }
    metadata = {f"{architecture}.{key}": value for key, value in keys.items()} | vocabulary
    shapes = [("token_embd.weight", (len(tokens), size.hidden)), (f"{kind.final_norm}.weight", (size.hidden,))]
    for layer in range(size.n_layer):
        shapes += [(f"blk.{layer}.{name}", shape) for name, shape in kind.tensors(size, layer)]
    return write_random_gguf(path, architecture, metadata, shapes, {"": tensor_type} | _PLAIN, seed=seed)


_PLAIN = {"conv": "F32", "ssm_a": "F32", "ssm_d": "F32", "ssm_dt": "F32", "ffn_gate_inp": "F32", "attn_k_b": "Q8_0"}
"""Types that llama.cpp wants, or that rows too short for blocks of 256 need."""


def _attention(size: Sizes, *, normed: bool) -> Shapes:
    queries, keys = size.n_head * size.head_dim, size.n_kv_head * size.head_dim
    for part, rows in {"attn_q": queries, "attn_k": keys, "attn_v": keys}.items():
        yield f"{part}.weight", (rows, size.hidden)
    yield "attn_output.weight", (size.hidden, queries)
    if normed:
        yield "attn_q_norm.weight", (size.head_dim,)
        yield "attn_k_norm.weight", (size.head_dim,)


def _dense(size: Sizes) -> Shapes:
    yield "ffn_gate.weight", (size.ff, size.hidden)
    yield "ffn_up.weight", (size.ff, size.hidden)
    yield "ffn_down.weight", (size.hidden, size.ff)


def _experts(size: Sizes) -> Shapes:
    yield "ffn_gate_inp.weight", (size.n_expert, size.hidden)
    yield "ffn_gate_exps.weight", (size.n_expert, size.ff, size.hidden)
    yield "ffn_up_exps.weight", (size.n_expert, size.ff, size.hidden)
    yield "ffn_down_exps.weight", (size.n_expert, size.hidden, size.ff)


def _norms(size: Sizes, *names: str) -> Shapes:
    for name in names:
        yield name, (size.hidden,)


def _qwen3moe(size: Sizes, _layer: int) -> Shapes:
    yield from _norms(size, "attn_norm.weight", "ffn_norm.weight")
    yield from _attention(size, normed=True)
    yield from _experts(size)


def _deepseek2(size: Sizes, layer: int) -> Shapes:
    yield from _norms(size, "attn_norm.weight", "ffn_norm.weight")
    yield "attn_q_a.weight", (_RANK, size.hidden)
    yield "attn_q_a_norm.weight", (_RANK,)
    yield "attn_q_b.weight", (size.n_head * (_NOPE + _ROPE), _RANK)
    yield "attn_kv_a_mqa.weight", (_RANK + _ROPE, size.hidden)
    yield "attn_kv_a_norm.weight", (_RANK,)
    yield "attn_k_b.weight", (size.n_head, _RANK, _NOPE)
    yield "attn_v_b.weight", (size.n_head, _NOPE, _RANK)
    yield "attn_output.weight", (size.hidden, size.n_head * _NOPE)
    if layer == 0:
        yield from _dense(size)
        return
    yield from _experts(size)
    for name, shape in _dense(size):
        yield name.replace(".weight", "_shexp.weight"), shape


def _mamba(size: Sizes, _layer: int) -> Shapes:
    yield from _norms(size, "attn_norm.weight")
    yield "ssm_in.weight", (2 * size.inner, size.hidden)
    yield "ssm_conv1d.weight", (size.inner, _CONV)
    yield "ssm_conv1d.bias", (size.inner,)
    yield "ssm_x.weight", (_STEP_RANK + 2 * _STATE, size.inner)
    yield "ssm_dt.weight", (size.inner, _STEP_RANK)
    yield "ssm_dt.bias", (size.inner,)
    yield "ssm_a", (size.inner, _STATE)
    yield "ssm_d", (size.inner,)
    yield "ssm_out.weight", (size.hidden, size.inner)


def _falcon_h1(size: Sizes, _layer: int) -> Shapes:
    mixed = size.inner + 2 * _STATE
    yield from _norms(size, "attn_norm.weight", "ffn_norm")
    yield "ssm_in.weight", (size.inner + mixed + _STEP_RANK, size.hidden)
    yield "ssm_conv1d.weight", (mixed, _CONV)
    yield "ssm_conv1d.bias", (mixed,)
    yield "ssm_dt.bias", (_STEP_RANK,)
    yield "ssm_a", (_STEP_RANK, 1)
    yield "ssm_d", (_STEP_RANK, 1)
    yield "ssm_out.weight", (size.hidden, size.inner)
    yield from _attention(size, normed=False)
    yield from _dense(size)


def _lfm2(size: Sizes, layer: int) -> Shapes:
    yield from _norms(size, "attn_norm.weight", "ffn_norm.weight")
    if layer % 2:
        yield from _attention(size, normed=True)
    else:
        yield "shortconv.conv.weight", (size.hidden, _SHORT_CONV)
        yield "shortconv.in_proj.weight", (3 * size.hidden, size.hidden)
        yield "shortconv.out_proj.weight", (size.hidden, size.hidden)
    yield from _dense(size)


def _rope(size: Sizes) -> dict[str, Any]:
    return {
        "rope.dimension_count": size.head_dim,
        "attention.key_length": size.head_dim,
        "attention.value_length": size.head_dim,
    }


def _moe_keys(size: Sizes) -> dict[str, Any]:
    return {"expert_count": size.n_expert, "expert_used_count": 2, "expert_feed_forward_length": size.ff}


def _ssm_keys(size: Sizes) -> dict[str, Any]:
    return {
        "ssm.conv_kernel": _CONV,
        "ssm.inner_size": size.inner,
        "ssm.state_size": _STATE,
        "ssm.time_step_rank": _STEP_RANK,
    }


def _latent_keys(size: Sizes) -> dict[str, Any]:
    return {
        **_moe_keys(size),
        "expert_shared_count": 1,
        "leading_dense_block_count": 1,
        "attention.head_count_kv": 1,
        "attention.q_lora_rank": _RANK,
        "attention.kv_lora_rank": _RANK,
        "attention.key_length": _RANK + _ROPE,
        "attention.value_length": _RANK,
        "attention.key_length_mla": _NOPE + _ROPE,
        "attention.value_length_mla": _NOPE,
        "rope.dimension_count": _ROPE,
    }


def _hybrid_heads(size: Sizes) -> dict[str, Any]:
    heads = [size.n_kv_head if layer % 2 else 0 for layer in range(size.n_layer)]
    return {"shortconv.l_cache": _SHORT_CONV, "attention.head_count_kv": heads, "rope.dimension_count": size.head_dim}


KINDS: Mapping[str, Kind] = {
    "qwen3moe": Kind(lambda size: {**_rope(size), **_moe_keys(size)}, _qwen3moe),
    "deepseek2": Kind(_latent_keys, _deepseek2),
    "mamba": Kind(lambda size: {**_ssm_keys(size), "attention.head_count": 0, "feed_forward_length": 0}, _mamba),
    "falcon-h1": Kind(lambda size: {**_rope(size), **_ssm_keys(size), "ssm.group_count": 1}, _falcon_h1),
    "lfm2": Kind(_hybrid_heads, _lfm2, final_norm="token_embd_norm"),
}
