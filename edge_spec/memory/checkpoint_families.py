"""Which tensors a checkpoint's `config.json` implies, and what its layers keep, by `model_type`.

Source: the configurations and modules of each family in transformers (`models/*/configuration_*.py`, `modeling_*.py`),
and for the names of GGUF files llama.cpp's converters. Another `model_type` is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from edge_spec.errors import ModelFormatError, UnsupportedArchitectureError
from edge_spec.memory.facts import Layer

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """How a family of checkpoints departs from the plain decoder. `architecture` is its name in GGUF files."""

    architecture: str
    biases: Literal["none", "inputs", "all"] = "none"
    qk_norm: Literal["none", "head", "heads", "rows"] = "none"
    """Norms of queries and keys: of one head's width, of each head apart, of a whole row."""
    post_norms: bool = False
    fused: bool = False
    gated: bool = True
    one_norm: bool = False
    """Attention and network share the norm before them."""
    tied: bool = False
    """Embedding and head are one where the config does not say."""
    latent: bool = False
    experts: str = ""
    """Key of the number of experts; empty for dense families."""
    windows: int = 0
    """Every so many-th layer sees all tokens, the others a window; 0: all do."""


FAMILIES = {
    "llama": Family(architecture="llama"),
    "mistral": Family(architecture="llama"),
    "mixtral": Family(architecture="llama", experts="num_local_experts"),
    "smollm3": Family(architecture="smollm3", tied=True),
    "qwen2": Family(architecture="qwen2", biases="inputs"),
    "qwen2_moe": Family(architecture="qwen2moe", biases="inputs", experts="num_experts"),
    "qwen3": Family(architecture="qwen3", qk_norm="head"),
    "qwen3_moe": Family(architecture="qwen3moe", qk_norm="head", experts="num_experts"),
    "phi3": Family(architecture="phi3", fused=True),
    "gemma": Family(architecture="gemma", tied=True),
    "gemma2": Family(architecture="gemma2", post_norms=True, tied=True, windows=2),
    "gemma3_text": Family(architecture="gemma3", qk_norm="head", post_norms=True, tied=True, windows=6),
    "cohere": Family(architecture="command-r", one_norm=True, tied=True, qk_norm="heads"),
    "cohere2": Family(architecture="cohere2", one_norm=True, tied=True, windows=4),
    "starcoder2": Family(architecture="starcoder2", biases="all", gated=False, tied=True),
    "olmo2": Family(architecture="olmo2", qk_norm="rows"),
    "granite": Family(architecture="granite"),
    "deepseek_v2": Family(architecture="deepseek2", latent=True, experts="n_routed_experts"),
    "deepseek_v3": Family(architecture="deepseek2", latent=True, experts="n_routed_experts"),
}


@dataclass(frozen=True, slots=True)
class Sizes:
    """The numbers that every family's config has, checked."""

    n_layer: int
    hidden: int
    n_head: int
    n_kv_head: int
    head_dim: int
    n_ff: int
    n_vocab: int
    n_ctx_train: int
    tied: bool


def find_family(config: dict[str, Any], name: str) -> Family:
    """The family of a config's `model_type`; UnsupportedArchitectureError names it and those that are known."""
    kind = config.get("model_type")
    if kind not in FAMILIES:
        raise UnsupportedArchitectureError(
            f"{name}: checkpoints of the type {kind!r} are not known here, and their memory is not guessed; known are "
            f"{', '.join(sorted(FAMILIES))}"
        )
    return FAMILIES[kind]


def read_sizes(config: dict[str, Any], family: Family, name: str) -> Sizes:
    """The sizes of a config; ModelFormatError where one is missing or no positive number."""
    read = reader(config, name)
    n_head, hidden = read("num_attention_heads"), read("hidden_size")
    return Sizes(
        n_layer=read("num_hidden_layers"),
        hidden=hidden,
        n_head=n_head,
        n_kv_head=read("num_key_value_heads", n_head),
        head_dim=read("head_dim", max(1, hidden // n_head)),
        n_ff=read("intermediate_size"),
        n_vocab=read("vocab_size"),
        n_ctx_train=read("max_position_embeddings", 4096),
        tied=bool(config.get("tie_word_embeddings", family.tied)),
    )


def reader(config: dict[str, Any], name: str) -> Callable[..., int]:
    """A function that reads a positive whole number of the config, or gives a default."""

    def read(key: str, default: int | None = None) -> int:
        value = config.get(key)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ModelFormatError(f"{name}: {key} is {value!r}, not a positive whole number")
        return value

    return read


def implied_shapes(config: dict[str, Any], family: Family, sizes: Sizes, name: str) -> Shapes:
    """Shapes of all tensors, by their names in GGUF files."""
    shapes: Shapes = {"token_embd.weight": (sizes.n_vocab, sizes.hidden), "output_norm.weight": (sizes.hidden,)}
    if not sizes.tied:
        shapes["output.weight"] = (sizes.n_vocab, sizes.hidden)
    attention = _latent(config, sizes, name) if family.latent else _attention(config, family, sizes)
    for layer in range(sizes.n_layer):
        parts = attention | _norms(family, sizes) | _network(config, family, sizes, layer, name)
        shapes |= {f"blk.{layer}.{part}": shape for part, shape in parts.items()}
    return shapes


def layers_of_config(config: dict[str, Any], family: Family, sizes: Sizes, name: str) -> tuple[Layer, ...]:
    """What each layer keeps of a context."""
    if family.latent:
        read = reader(config, name)
        width = read("kv_lora_rank") + read("qk_rope_head_dim")
        return (Layer(1, width, 0),) * sizes.n_layer
    window = config.get("sliding_window") or 0
    every = config.get("sliding_window_pattern") or family.windows
    kinds = config.get("layer_types")
    layers = []
    for layer in range(sizes.n_layer):
        local = bool(family.windows) and (layer + 1) % every != 0
        if isinstance(kinds, list) and len(kinds) == sizes.n_layer:
            local = kinds[layer] == "sliding_attention"
        layers.append(Layer(sizes.n_kv_head, sizes.head_dim, sizes.head_dim, window if local else 0))
    return tuple(layers)


def _attention(config: dict[str, Any], family: Family, sizes: Sizes) -> Shapes:
    queries, keys = sizes.n_head * sizes.head_dim, sizes.n_kv_head * sizes.head_dim
    parts: Shapes = {"attn_output.weight": (sizes.hidden, queries)}
    inputs = {"attn_qkv": queries + 2 * keys} if family.fused else {"attn_q": queries, "attn_k": keys, "attn_v": keys}
    parts |= {f"{part}.weight": (rows, sizes.hidden) for part, rows in inputs.items()}
    if family.biases != "none" or config.get("attention_bias"):
        parts |= {f"{part}.bias": (rows,) for part, rows in inputs.items()}
    if family.biases == "all":
        parts["attn_output.bias"] = (sizes.hidden,)
    normed = {
        "head": ((sizes.head_dim,), (sizes.head_dim,)),
        "heads": ((sizes.n_head, sizes.head_dim), (sizes.n_kv_head, sizes.head_dim)),
        "rows": ((queries,), (keys,)),
    }
    if family.qk_norm in normed and config.get("use_qk_norm", True):
        parts["attn_q_norm.weight"], parts["attn_k_norm.weight"] = normed[family.qk_norm]
    return parts


def _latent(config: dict[str, Any], sizes: Sizes, name: str) -> Shapes:
    """Multi-head latent attention with the projections absorbed, as GGUF files have it (arXiv 2405.04434)."""
    read = reader(config, name)
    rank, rope, nope, value = (
        read(key) for key in ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")
    )
    queries = sizes.n_head * (nope + rope)
    parts: Shapes = {
        "attn_kv_a_mqa.weight": (rank + rope, sizes.hidden),
        "attn_kv_a_norm.weight": (rank,),
        "attn_k_b.weight": (sizes.n_head, rank, nope),
        "attn_v_b.weight": (sizes.n_head, value, rank),
        "attn_output.weight": (sizes.hidden, sizes.n_head * value),
    }
    if config.get("q_lora_rank"):
        query_rank = read("q_lora_rank")
        return parts | {
            "attn_q_a.weight": (query_rank, sizes.hidden),
            "attn_q_a_norm.weight": (query_rank,),
            "attn_q_b.weight": (queries, query_rank),
        }
    return parts | {"attn_q.weight": (queries, sizes.hidden)}


def _norms(family: Family, sizes: Sizes) -> Shapes:
    names = ["attn_norm"] if family.one_norm else ["attn_norm", "ffn_norm"]
    if family.post_norms:
        names += ["post_attention_norm", "post_ffw_norm"]
    shapes: Shapes = {f"{norm}.weight": (sizes.hidden,) for norm in names}
    return shapes | ({f"{norm}.bias": (sizes.hidden,) for norm in names} if family.biases == "all" else {})


def _network(config: dict[str, Any], family: Family, sizes: Sizes, layer: int, name: str) -> Shapes:
    read = reader(config, name)
    if not family.experts or layer < (config.get("first_k_dense_replace") or 0):
        return _dense(family, sizes.hidden, sizes.n_ff)
    count, width = read(family.experts), read("moe_intermediate_size", sizes.n_ff)
    shapes: Shapes = {"ffn_gate_inp.weight": (count, sizes.hidden)}
    shapes |= {f"ffn_{part}_exps.weight": (count, width, sizes.hidden) for part in ("gate", "up")}
    shapes["ffn_down_exps.weight"] = (count, sizes.hidden, width)
    shared = config.get("shared_expert_intermediate_size") or width * (config.get("n_shared_experts") or 0)
    if shared:
        shapes |= {f"ffn_{part}_shexp.weight": (shared, sizes.hidden) for part in ("gate", "up")}
        shapes["ffn_down_shexp.weight"] = (sizes.hidden, shared)
    if config.get("shared_expert_intermediate_size"):
        shapes["ffn_gate_inp_shexp.weight"] = (sizes.hidden,)
    if config.get("topk_method") == "noaux_tc":
        shapes["exp_probs_b.bias"] = (count,)
    return shapes


def _dense(family: Family, hidden: int, n_ff: int) -> Shapes:
    if family.fused:
        return {"ffn_up.weight": (2 * n_ff, hidden), "ffn_down.weight": (hidden, n_ff)}
    parts: Shapes = {"ffn_up.weight": (n_ff, hidden), "ffn_down.weight": (hidden, n_ff)}
    if family.gated:
        parts["ffn_gate.weight"] = (n_ff, hidden)
    if family.biases == "all":
        parts |= {"ffn_up.bias": (n_ff,), "ffn_down.bias": (hidden,)}
    return parts
