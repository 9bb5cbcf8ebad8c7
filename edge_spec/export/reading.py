"""Read what the exporter needs to know of a decoder out of a GGUF, and check it against the tensors."""

from __future__ import annotations

from dataclasses import replace

from edge_spec.errors import ModelFormatError, UnsupportedArchitectureError
from edge_spec.export.architecture import DecoderConfig, bias_shapes, tensor_shapes
from edge_spec.export.rope import ROPE_TENSORS, RopeScaling, read_rope_scaling
from edge_spec.export.traits import SUPPORTED, TRAITS, Traits
from edge_spec.formats.gguf import INTEGERS, GGUFArray, GGUFFile

HEAD_DIM_STEP = 16
"""ONNX Runtime's GroupQueryAttention takes heads of a multiple of so many values."""

ROPE_DIM_STEP = 16
"""The same of rotary dimensions: eight pairs."""

_INT32_MAX = 2**31 - 1


def read_config(gguf: GGUFFile) -> DecoderConfig:
    """Read and cross-check the sizes of a supported decoder.

    Raises UnsupportedArchitectureError for what the graph could not express, ModelFormatError for tensors that are
    missing or whose shapes contradict the metadata.
    """
    architecture = gguf.architecture
    if architecture not in SUPPORTED:
        raise UnsupportedArchitectureError(
            f"the exporter knows the architectures {', '.join(SUPPORTED)}, not {architecture!r} ({gguf.path.name})"
        )
    hidden = gguf.hparam_int("embedding_length")
    n_head = gguf.hparam_int("attention.head_count")
    if not (hidden > 0 and n_head > 0):
        raise ModelFormatError(f"{gguf.path}: embedding_length {hidden} and head_count {n_head} must be positive")
    head_dim = gguf.hparam_int("attention.key_length", hidden // n_head)
    if gguf.hparam_int("attention.value_length", head_dim) != head_dim:
        raise UnsupportedArchitectureError(f"{gguf.path.name}: keys and values of different width")
    if head_dim % HEAD_DIM_STEP:
        raise UnsupportedArchitectureError(
            f"{gguf.path.name}: heads of {head_dim} values; the runtime's attention wants multiples of {HEAD_DIM_STEP}"
        )
    if gguf.hparam_int("expert_count", 0):
        raise UnsupportedArchitectureError(f"{gguf.path.name}: a mixture of experts; the exporter builds dense models")
    embedding = gguf.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise ModelFormatError(f"{gguf.path}: no matrix token_embd.weight")
    traits = TRAITS[architecture]
    n_layer = gguf.hparam_int("block_count")
    config = DecoderConfig(
        architecture=architecture,
        n_layer=n_layer,
        hidden=hidden,
        n_head=n_head,
        n_kv_head=gguf.hparam_int("attention.head_count_kv", n_head),
        head_dim=head_dim,
        n_ff=gguf.hparam_int("feed_forward_length"),
        n_vocab=embedding.shape[0],
        n_ctx_train=gguf.hparam_int("context_length"),
        rms_epsilon=gguf.hparam_float("attention.layer_norm_rms_epsilon"),
        rope_base=gguf.hparam_float("rope.freq_base", 10000.0),
        rope_dim=gguf.hparam_int("rope.dimension_count", head_dim),
        rope_interleaved=traits.rope_interleaved,
        rope_factors=None,
        tied="output.weight" not in gguf.tensors,
        attention_scale=(hidden // n_head) ** -0.5 if n_layer == traits.coarse_scale_layers else 0.0,
        attention_softcap=_softcap(gguf, "attn_logit_softcapping", traits.attention_softcap),
        logit_softcap=_softcap(gguf, "final_logit_softcapping", traits.logit_softcap),
        n_ctx_exact=_exact_context(gguf),
    )
    _check_sizes(gguf, config)
    _check_tensors(gguf, config)
    # Only now are the sizes known to be those of tensors, and safe to make tables of.
    return _with_positions(gguf, config)


def _check_sizes(gguf: GGUFFile, config: DecoderConfig) -> None:
    sizes = ("n_layer", "n_kv_head", "head_dim", "n_ff", "n_vocab", "n_ctx_train", "rope_base")
    wrong = [name for name in sizes if getattr(config, name) <= 0]
    if wrong or config.n_head % config.n_kv_head or not 0 < config.rope_dim <= config.head_dim or config.rope_dim % 2:
        raise ModelFormatError(f"{gguf.path}: the sizes in the metadata contradict each other: {config.to_json()}")
    if config.rope_dim % ROPE_DIM_STEP:
        raise UnsupportedArchitectureError(
            f"{gguf.path.name}: {config.rope_dim} rotary dimensions; the runtime's attention wants multiples of "
            f"{ROPE_DIM_STEP}"
        )
    if config.n_layer > len(gguf.tensors):
        raise ModelFormatError(f"{gguf.path}: {config.n_layer} layers, but only {len(gguf.tensors)} tensors")
    _check_vocabulary(gguf, config.n_vocab)


def _check_vocabulary(gguf: GGUFFile, n_rows: int) -> None:
    """Tokens and embedding rows have to go together: rows without a token are padding, tokens without a row are not."""
    said = gguf.hparam_int("vocab_size", n_rows)
    if said != n_rows:
        raise ModelFormatError(
            f"{gguf.path}: {gguf.hparam('vocab_size')} is {said}, and token_embd.weight has {n_rows} rows"
        )
    tokens = gguf.metadata.get("tokenizer.ggml.tokens")
    if isinstance(tokens, GGUFArray) and len(tokens) > n_rows:
        raise ModelFormatError(
            f"{gguf.path}: the tokenizer lists {len(tokens)} tokens, and token_embd.weight has {n_rows} rows"
        )


def _check_tensors(gguf: GGUFFile, config: DecoderConfig) -> None:
    """Each tensor is there, has its shape, and is one that the graph uses: an ignored one would be a wrong model."""
    required, optional, title = tensor_shapes(config), bias_shapes(config), gguf.title
    for name, shape in required.items():
        if name not in gguf.tensors:
            raise ModelFormatError(f"{gguf.path}: the tensor {title(name)} is missing")
        if gguf.tensors[name].shape != shape:
            raise ModelFormatError(f"{gguf.path}: {title(name)} has the shape {gguf.tensors[name].shape}, not {shape}")
    for name, tensor in gguf.tensors.items():
        if name in required or name in ROPE_TENSORS:
            continue
        if name not in optional:
            raise UnsupportedArchitectureError(
                f"{gguf.path.name}: the exporter has no use for the tensor {title(name)}"
            )
        if tensor.shape != optional[name]:
            raise ModelFormatError(f"{gguf.path}: {title(name)} has the shape {tensor.shape}, not {optional[name]}")
        for twin in (f"blk.{layer}.{name.split('.', 2)[2]}" for layer in range(config.n_layer)):
            if twin not in gguf.tensors:
                raise ModelFormatError(f"{gguf.path}: the tensor {title(twin)} is missing, and {title(name)} is there")
    for name in (*required, *optional):
        if name in gguf.tensors and gguf.tensors[name].type in INTEGERS:
            kind = gguf.tensors[name].type.name
            raise ModelFormatError(f"{gguf.path}: the tensor {title(name)} holds integers ({kind}), not weights")


def _with_positions(gguf: GGUFFile, config: DecoderConfig) -> DecoderConfig:
    """Add what makes positions count: how rotation is stretched, and what each layer sees."""
    rope = read_rope_scaling(gguf, dim=config.rope_dim, base=config.rope_base)
    windows = _windows(gguf, config.traits, config.n_layer)
    return replace(
        config,
        rope_factors=rope.factors,
        rope_long_factors=rope.long_factors,
        rope_short_ctx=rope.short_ctx,
        rope_magnitude=rope.magnitude,
        rope_local_base=_local_base(gguf, config.traits, config.rope_base, rope) if windows else 0.0,
        windows=windows,
    )


def _windows(gguf: GGUFFile, traits: Traits, n_layer: int) -> tuple[int, ...]:
    """Each layer's window, empty if none has one. The pattern is one flag a layer, or every how many none has one."""
    window = gguf.hparam_int("attention.sliding_window", traits.default_window)
    key = "attention.sliding_window_pattern"
    named = isinstance(gguf.metadata.get(gguf.hparam(key)), GGUFArray)
    # A window without its layers is ignored in architectures that llama.cpp gives none.
    if window <= 0 or not (traits.full_attention_every or named):
        return ()
    if named:
        flags = gguf.get_array(gguf.hparam(key)).tolist()
        if len(flags) < n_layer:
            raise ModelFormatError(f"{gguf.path}: {key} is for {len(flags)} layers, not {n_layer}")
    else:
        every = gguf.hparam_int(key, traits.full_attention_every)
        flags = [every <= 0 or (layer + 1) % every != 0 for layer in range(n_layer)]
    return tuple(min(window, _INT32_MAX) if flag else 0 for flag in flags[:n_layer])


def _local_base(gguf: GGUFFile, traits: Traits, base: float, rope: RopeScaling) -> float:
    """Base of the windowed layers, 0 where they rotate as the others do."""
    local = gguf.hparam_float("rope.freq_base_swa", traits.local_rope_base or base)
    if not traits.local_rope_base and local == base:
        return 0.0
    if not traits.local_rope_base or rope.magnitude != 1 or local <= 0:
        raise UnsupportedArchitectureError(f"{gguf.path.name}: windowed layers with a rotary embedding of their own")
    return local


def _softcap(gguf: GGUFFile, key: str, default: float) -> float:
    cap = gguf.hparam_float(key, default)
    if cap < 0:
        raise ModelFormatError(f"{gguf.path}: {key} is {cap}, not a bound")
    return cap


def _exact_context(gguf: GGUFFile) -> int:
    """Tokens before attention of which the temperature rises begins to rise; 0 where it never does."""
    if gguf.hparam_float("attention.temperature_scale", 0.0) == 0:
        return 0
    original = gguf.hparam_int("rope.scaling.original_context_length", gguf.hparam_int("context_length"))
    if original <= 0:
        raise ModelFormatError(f"{gguf.path}: attention that is heated past an original context of {original} tokens")
    return original
