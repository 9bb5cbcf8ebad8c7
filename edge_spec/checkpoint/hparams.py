"""A checkpoint's config.json as the keys of a GGUF, for the families that our own graph builder knows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edge_spec.checkpoint.families import FAMILIES, Family
from edge_spec.checkpoint.folder import CONFIG, Checkpoint, positive
from edge_spec.checkpoint.rotary import Rotary, read_rotary
from edge_spec.errors import ModelFormatError, UnsupportedArchitectureError

_LARGEST_GEMMAS = {"gemma2": 46, "gemma3_text": 62}
"""Layers of the models whose scores are divided by √(hidden / heads); the others' by the root of the heads' width."""


def find_family(checkpoint: Checkpoint) -> Family:
    """The family of a checkpoint; UnsupportedArchitectureError names those that there are."""
    try:
        return FAMILIES[checkpoint.model_type]
    except KeyError:
        raise UnsupportedArchitectureError(
            f"{checkpoint.path}: the exporter knows checkpoints of the types {', '.join(FAMILIES)}, not "
            f"{checkpoint.model_type!r}"
        ) from None


def is_tied(checkpoint: Checkpoint, family: Family) -> bool:
    """Whether the output head is the embedding table."""
    return bool(checkpoint.config.get("tie_word_embeddings", family.tied))


def read_hparams(checkpoint: Checkpoint, family: Family) -> tuple[dict[str, Any], Rotary]:
    """Keys of a GGUF with the architecture's name before them, and the rotary embedding they include.

    UnsupportedArchitectureError for a config that departs from its family, ModelFormatError for numbers that are none.
    """
    config, where = checkpoint.config, str(checkpoint.path / CONFIG)
    _refuse_departures(checkpoint, family)
    n_head, hidden = checkpoint.get_int("num_attention_heads"), checkpoint.get_int("hidden_size")
    head_dim = checkpoint.get_int("head_dim") if config.get("head_dim") is not None else max(1, hidden // n_head)
    n_ctx, n_layer = checkpoint.get_int("max_position_embeddings"), checkpoint.get_int("num_hidden_layers")
    rotary = read_rotary(config, head_dim=head_dim, n_ctx_train=n_ctx, where=where)
    keys: dict[str, Any] = {
        "block_count": n_layer,
        "context_length": n_ctx,
        "embedding_length": hidden,
        "feed_forward_length": checkpoint.get_int("intermediate_size"),
        "attention.head_count": n_head,
        "attention.head_count_kv": checkpoint.get_int("num_key_value_heads", "num_attention_heads"),
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": positive(config.get("rms_norm_eps"), "rms_norm_eps", where),
        "vocab_size": checkpoint.get_int("vocab_size"),
        **rotary.keys,
        **_windows(checkpoint, family, n_layer, n_ctx),
    }
    if family.architecture.startswith("gemma"):
        _check_scale(checkpoint, head_dim)
        for cap in ("attn_logit_softcapping", "final_logit_softcapping"):
            keys[cap] = positive(config[cap], cap, where) if config.get(cap) else 0.0
    if family.architecture == "gemma3":
        keys["rope.freq_base_swa"] = _local_base(config, where)
    if max((value for value in keys.values() if type(value) is int), default=0) >= 1 << 31:
        raise ModelFormatError(f"{where}: its sizes are beyond those of any model")
    named = {f"{family.architecture}.{key}": value for key, value in keys.items()}
    return {"general.architecture": family.architecture, **named}, rotary


def _refuse_departures(checkpoint: Checkpoint, family: Family) -> None:
    config, where = checkpoint.config, checkpoint.path
    activation = config.get("hidden_activation" if family.architecture.startswith("gemma") else "hidden_act")
    if activation not in (*family.activations, None):
        raise UnsupportedArchitectureError(f"{where}: the activation {activation!r} in a {checkpoint.model_type}")
    quantized = config.get("quantization_config")
    if quantized:
        method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized
        raise UnsupportedArchitectureError(
            f"{where}: its weights are quantised already ({method}); take the checkpoint that they were made of"
        )
    if config.get("use_bidirectional_attention"):
        raise UnsupportedArchitectureError(f"{where}: attention in both directions; it is no model that writes")
    rotated = config.get("no_rope_layers")
    if family.architecture == "smollm3" and rotated is not None:
        expected = [int((layer + 1) % 4 != 0) for layer in range(checkpoint.get_int("num_hidden_layers"))]
        if rotated != expected:
            raise UnsupportedArchitectureError(f"{where}: rotary embeddings in other layers than three of four")


def _windows(checkpoint: Checkpoint, family: Family, n_layer: int, n_ctx: int) -> dict[str, Any]:
    """The window and the layers that have one; nothing where no layer ever leaves something out."""
    config, window = checkpoint.config, checkpoint.config.get("sliding_window")
    if window is None or config.get("use_sliding_window") is False:
        return {"attention.sliding_window": 0} if family.full_attention_every else {}
    window = checkpoint.get_int("sliding_window")
    kinds = config.get("layer_types")
    if isinstance(kinds, list):
        if len(kinds) < n_layer or not set(kinds) <= {"sliding_attention", "full_attention"}:
            raise ModelFormatError(f"{checkpoint.path / CONFIG}: layer_types are not those of {n_layer} layers")
        flags = [kind == "sliding_attention" for kind in kinds[:n_layer]]
    elif family.full_attention_every:
        every = config.get("sliding_window_pattern") or config.get("_sliding_window_pattern")
        every = every if type(every) is int and every > 0 else family.full_attention_every
        flags = [(layer + 1) % every != 0 for layer in range(n_layer)]
    elif "max_window_layers" in config:
        first = config["max_window_layers"] if type(config["max_window_layers"]) is int else 0
        flags = [layer >= first for layer in range(n_layer)]
    else:
        flags = [True] * n_layer
    if not family.full_attention_every and (window >= n_ctx or not any(flags)):
        return {}
    return {"attention.sliding_window": window, "attention.sliding_window_pattern": flags}


def _check_scale(checkpoint: Checkpoint, head_dim: int) -> None:
    """The config may scale scores by any number; the graph knows the two that models have."""
    said = checkpoint.config.get("query_pre_attn_scalar")
    n_layer = checkpoint.get_int("num_hidden_layers")
    coarse = n_layer == _LARGEST_GEMMAS.get(checkpoint.model_type)
    expected = checkpoint.get_int("hidden_size") // checkpoint.get_int("num_attention_heads") if coarse else head_dim
    if said is not None and said != expected:
        raise UnsupportedArchitectureError(
            f"{checkpoint.path}: query_pre_attn_scalar is {said!r}; the exporter knows {expected} for its size"
        )


def _local_base(config: Mapping[str, Any], where: str) -> float:
    """Base of the rotary embedding in layers with a window."""
    parameters = config.get("rope_parameters")
    local = parameters.get("sliding_attention") if isinstance(parameters, dict) else None
    base = local.get("rope_theta") if isinstance(local, dict) else config.get("rope_local_base_freq")
    return positive(base, "the base of windowed layers", where, 10000.0)
