"""The checkpoint that a GGUF could have been converted from: what llama.cpp's converter does, undone.

Written by itself and not with the reader's tables, so that both have to be right.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edge_spec.formats.gguf import GGUFFile
from tests.tiny_checkpoint import Array, tokenizer_json, write_checkpoint

MODEL_TYPES = {
    "llama": "llama",
    "mistral": "llama",
    "smollm3": "smollm3",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "phi3": "phi3",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
}
"""The `model_type` of a checkpoint, and the architecture of its GGUF."""

_NAMES = [
    (r"^token_embd\.", "model.embed_tokens."),
    (r"^output_norm\.", "model.norm."),
    (r"^output\.", "lm_head."),
    (r"blk\.(\d+)\.", r"model.layers.\1."),
    (r"\.attn_norm\.", ".input_layernorm."),
    (r"\.attn_(q|k)_norm\.", r".self_attn.\1_norm."),
    (r"\.attn_(q|k|v|qkv)\.", r".self_attn.\1_proj."),
    (r"\.attn_output\.", ".self_attn.o_proj."),
    (r"\.ffn_(gate|up|down)\.", r".mlp.\1_proj."),
]
_TWO_NORMS = [(r"\.ffn_norm\.", ".post_attention_layernorm.")]
_FOUR_NORMS = [
    (r"\.post_attention_norm\.", ".post_attention_layernorm."),
    (r"\.ffn_norm\.", ".pre_feedforward_layernorm."),
    (r"\.post_ffw_norm\.", ".post_feedforward_layernorm."),
]


def write_checkpoint_of(
    gguf: Path,
    folder: Path,
    model_type: str,
    *,
    dtype: str = "F32",
    config: Mapping[str, Any] | None = None,
    tokenizer: Mapping[str, Any] | None = None,
) -> Path:
    """The folder of a checkpoint with the weights of a GGUF; `config` changes keys, None drops one."""
    with GGUFFile(gguf) as source:
        sizes = _config(source, model_type)
        tensors = dict(
            _tensor(source, name, model_type, dtype) for name in source.tensors if not name.startswith("rope_")
        )
    vocabulary = tokenizer or tokenizer_json(sizes["vocab_size"])
    return write_checkpoint(folder, config=sizes | dict(config or {}), tensors=tensors, tokenizer=vocabulary)


def _config(source: GGUFFile, model_type: str) -> dict[str, Any]:
    hidden, n_head = source.hparam_int("embedding_length"), source.hparam_int("attention.head_count")
    head_dim = source.hparam_int("attention.key_length", hidden // n_head)
    config: dict[str, Any] = {
        "model_type": model_type,
        "vocab_size": source.tensors["token_embd.weight"].shape[0],
        "hidden_size": hidden,
        "intermediate_size": source.hparam_int("feed_forward_length"),
        "num_hidden_layers": source.hparam_int("block_count"),
        "num_attention_heads": n_head,
        "num_key_value_heads": source.hparam_int("attention.head_count_kv"),
        "head_dim": head_dim,
        "max_position_embeddings": source.hparam_int("context_length"),
        "rms_norm_eps": source.hparam_float("attention.layer_norm_rms_epsilon"),
        "rope_theta": source.hparam_float("rope.freq_base"),
        "tie_word_embeddings": "output.weight" not in source.tensors,
    }
    if model_type.startswith("gemma"):
        window = source.hparam_int("attention.sliding_window")
        config |= {
            "hidden_activation": "gelu_pytorch_tanh",
            "query_pre_attn_scalar": head_dim,
            "sliding_window": window,
        }
        kinds = ("full_attention", "sliding_attention")
        config["layer_types"] = [kinds[(layer + 1) % 2] for layer in range(config["num_hidden_layers"])]
    else:
        config["hidden_act"] = "silu"
    if model_type == "gemma2":
        for cap in ("attn_logit_softcapping", "final_logit_softcapping"):
            config[cap] = source.hparam_float(cap)
    if model_type == "gemma3_text":
        factor = source.hparam_float("rope.scaling.factor")
        config |= {"rope_local_base_freq": 10000.0, "rope_scaling": {"rope_type": "linear", "factor": factor}}
    if model_type == "phi3":
        tables = {kind: source.dequantize(f"rope_factors_{kind}.weight").tolist() for kind in ("short", "long")}
        config |= {
            "original_max_position_embeddings": source.hparam_int("rope.scaling.original_context_length"),
            "partial_rotary_factor": source.hparam_int("rope.dimension_count") / head_dim,
            "rope_scaling": {
                "type": "longrope",
                "short_factor": tables["short"],
                "long_factor": tables["long"],
                "attention_factor": source.hparam_float("rope.scaling.attn_factor"),
            },
        }
    return config


def _tensor(source: GGUFFile, name: str, model_type: str, dtype: str) -> tuple[str, tuple[str, Array]]:
    values: Array = source.dequantize(name)
    if source.architecture in ("llama", "smollm3") and re.search(r"\.attn_[qk]\.", name):
        values = _halves_apart(values, source.hparam_int("attention.head_count" + "_kv" * (".attn_k." in name)))
    if model_type.startswith("gemma") and name.endswith("norm.weight"):
        values = (values.astype(np.float64) - 1).astype(np.float32)
    if model_type == "phi3":
        name = name.replace(".ffn_up.", ".ffn_gate_up.")
    for pattern, replacement in _NAMES + (_FOUR_NORMS if model_type.startswith("gemma") else _TWO_NORMS):
        name = re.sub(pattern, replacement, name)
    name = name.replace(".ffn_gate_up.", ".mlp.gate_up_proj.")
    if dtype == "BF16":
        return name, (dtype, (values.view(np.uint32) >> 16).astype(np.uint16))
    return name, (dtype, values)


def _halves_apart(values: Array, n_head: int) -> Array:
    """Of each head's rows first the even ones, then the odd ones."""
    heads = values.reshape(n_head, -1, *values.shape[1:])
    return np.concatenate([heads[:, 0::2], heads[:, 1::2]], axis=1).reshape(values.shape)
