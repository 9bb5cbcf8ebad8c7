"""What the exporter needs to know of a decoder: its sizes, and which tensors play which part."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_spec.errors import ModelFormatError, UnsupportedArchitectureError
from edge_spec.export.rope import ROPE_TENSORS, RopeScaling, read_rope_scaling
from edge_spec.export.traits import SUPPORTED, TRAITS, Traits
from edge_spec.formats.gguf import GGUFArray, GGUFFile


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """A decoder's numbers; what its architecture implies is in `traits`."""

    architecture: str
    n_layer: int
    hidden: int
    n_head: int
    n_kv_head: int
    head_dim: int
    n_ff: int
    n_vocab: int
    n_ctx_train: int
    rms_epsilon: float
    rope_base: float
    rope_dim: int
    rope_interleaved: bool
    """Whether a rotary pair is (0, 1), (2, 3), … (llama files are permuted to that) or (0, d/2), (1, d/2 + 1), …"""
    rope_factors: tuple[float, ...] | None
    """Divides each pair's frequency (Llama 3's long-context scaling, linear scaling)."""
    tied: bool
    """Whether the output head is the embedding table."""
    rope_long_factors: tuple[float, ...] | None = None
    """`rope_factors` of a cache of more than `rope_short_ctx` tokens."""
    rope_short_ctx: int = 0
    rope_magnitude: float = 1.0
    """Multiplies cosines and sines."""
    rope_local_base: float = 0.0
    """Base, without factors, in windowed layers; 0: they rotate as the others do."""
    attention_scale: float = 0.0
    """Multiplies scores; 0: one over the square root of the heads' width."""
    attention_softcap: float = 0.0
    """Scores s become cap · tanh(s / cap); 0: they stay."""
    logit_softcap: float = 0.0
    windows: tuple[int, ...] = ()
    """Tokens that each layer sees, the newest included; 0 or no entry: all of them."""

    @property
    def traits(self) -> Traits:
        """What the architecture implies."""
        return TRAITS[self.architecture]

    @property
    def embedding_scale(self) -> float:
        """What embeddings are multiplied by."""
        return math.sqrt(self.hidden) if self.traits.scaled_embedding else 1.0

    @property
    def qkv_rows(self) -> int:
        """Rows of the fused query, key and value projection."""
        return (self.n_head + 2 * self.n_kv_head) * self.head_dim

    @property
    def head_tensor(self) -> str:
        """Name of the tensor that makes logits."""
        return "token_embd.weight" if self.tied else "output.weight"

    def window(self, layer: int) -> int:
        """Tokens that a layer sees; 0: all of them."""
        return self.windows[layer] if self.windows else 0

    def rope_of(self, layer: int) -> tuple[str, ...]:
        """The names of a layer's rotary tables, cosines and sines; none if it does not rotate."""
        every = self.traits.unrotated_every
        if every and (layer + 1) % every == 0:
            return ()
        return ("cos.local", "sin.local") if self.rope_local_base and self.window(layer) else ("cos", "sin")

    @property
    def rope_names(self) -> list[str]:
        """The rotary tables that layers use, sorted."""
        return sorted({name for layer in range(self.n_layer) for name in self.rope_of(layer)})

    def rope_inputs(self, rows: int, n_ctx: int) -> dict[str, NDArray[np.float32]]:
        """The rotary tables of `rows` positions, float32 [rows, rope_dim/2], for a cache of `n_ctx` tokens."""
        long = self.rope_long_factors is not None and n_ctx > self.rope_short_ctx
        factors = self.rope_long_factors if long else self.rope_factors
        tables = dict(zip(("cos", "sin"), self._rope_tables(rows, self.rope_base, factors), strict=True))
        if self.rope_local_base:
            local = self._rope_tables(rows, self.rope_local_base, None)
            tables |= dict(zip(("cos.local", "sin.local"), local, strict=True))
        return {name: tables[name] for name in self.rope_names}

    def _rope_tables(
        self, rows: int, base: float, factors: tuple[float, ...] | None
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Cosines and sines (rotary embedding, arXiv 2104.09864)."""
        frequencies = base ** (-np.arange(0, self.rope_dim, 2, dtype=np.float64) / self.rope_dim)
        if factors is not None:
            frequencies = frequencies / np.asarray(factors, dtype=np.float64)
        angles = np.outer(np.arange(rows, dtype=np.float64), frequencies)
        cos, sin = np.cos(angles) * self.rope_magnitude, np.sin(angles) * self.rope_magnitude
        return cos.astype(np.float32), sin.astype(np.float32)

    def to_json(self) -> dict[str, Any]:
        """Plain values for the export's metadata, without those that are as in most decoders."""
        defaults = {field.name: field.default for field in fields(self)}
        return {name: value for name, value in asdict(self).items() if value != defaults[name]}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> DecoderConfig:
        """The inverse of `to_json`; ModelFormatError if fields are missing or unknown."""
        plain: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in values.items()}
        if plain.get("architecture") not in TRAITS:
            raise ModelFormatError(f"the export's decoder is of the architecture {plain.get('architecture')!r}")
        try:
            return cls(**plain)
        except TypeError as exc:
            raise ModelFormatError(f"the export's decoder description is not complete: {exc}") from exc


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
        n_ctx_train=_longest_context(gguf),
        rms_epsilon=gguf.hparam_float("attention.layer_norm_rms_epsilon"),
        rope_base=gguf.hparam_float("rope.freq_base", 10000.0),
        rope_dim=gguf.hparam_int("rope.dimension_count", head_dim),
        rope_interleaved=traits.rope_interleaved,
        rope_factors=None,
        tied="output.weight" not in gguf.tensors,
        attention_scale=(hidden // n_head) ** -0.5 if n_layer == traits.coarse_scale_layers else 0.0,
        attention_softcap=_softcap(gguf, "attn_logit_softcapping", traits.attention_softcap),
        logit_softcap=_softcap(gguf, "final_logit_softcapping", traits.logit_softcap),
    )
    _check_sizes(gguf, config)
    _check_tensors(gguf, config)
    # Only now are the sizes known to be those of tensors, and safe to make tables of.
    return _with_positions(gguf, config)


def tensor_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor that the decoder cannot do without, by its GGUF name."""
    queries, keys = config.n_head * config.head_dim, config.n_kv_head * config.head_dim
    hidden, n_ff, traits = config.hidden, config.n_ff, config.traits
    parts: dict[str, tuple[int, ...]] = {"attn_norm": (hidden,)}
    if traits.fused_inputs:
        parts |= {"attn_qkv": (config.qkv_rows, hidden)}
    else:
        parts |= {"attn_q": (queries, hidden), "attn_k": (keys, hidden), "attn_v": (keys, hidden)}
    if traits.qk_norm:
        parts |= {"attn_q_norm": (config.head_dim,), "attn_k_norm": (config.head_dim,)}
    parts |= {"attn_output": (hidden, queries), "ffn_norm": (hidden,)}
    parts |= {"ffn_up": (2 * n_ff, hidden)} if traits.fused_inputs else dict.fromkeys(_GATED, (n_ff, hidden))
    parts |= {"ffn_down": (hidden, n_ff)}
    if traits.post_norms:
        parts |= {"post_attention_norm": (hidden,), "post_ffw_norm": (hidden,)}
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (config.n_vocab, hidden),
        "output_norm.weight": (hidden,),
    }
    if not config.tied:
        shapes["output.weight"] = (config.n_vocab, hidden)
    for layer in range(config.n_layer):
        shapes |= {f"blk.{layer}.{part}.weight": shape for part, shape in parts.items()}
    return shapes


_GATED = ("ffn_gate", "ffn_up")


def bias_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every bias that the decoder can have: a projection's weight may have one beside it."""
    return {
        name.removesuffix("weight") + "bias": shape[:1]
        for name, shape in tensor_shapes(config).items()
        if name.startswith("blk.") and len(shape) == 2
    }


def _check_sizes(gguf: GGUFFile, config: DecoderConfig) -> None:
    sizes = ("n_layer", "n_kv_head", "head_dim", "n_ff", "n_vocab", "n_ctx_train")
    wrong = [name for name in sizes if getattr(config, name) <= 0]
    if wrong or config.n_head % config.n_kv_head or not 0 < config.rope_dim <= config.head_dim or config.rope_dim % 2:
        raise ModelFormatError(f"{gguf.path}: the sizes in the metadata contradict each other: {config.to_json()}")
    if config.n_layer > len(gguf.tensors):
        raise ModelFormatError(f"{gguf.path}: {config.n_layer} layers, but only {len(gguf.tensors)} tensors")


def _check_tensors(gguf: GGUFFile, config: DecoderConfig) -> None:
    """Each tensor is there, has its shape, and is one that the graph uses: an ignored one would be a wrong model."""
    required, optional = tensor_shapes(config), bias_shapes(config)
    for name, shape in required.items():
        if name not in gguf.tensors:
            raise ModelFormatError(f"{gguf.path}: the tensor {name} is missing")
        if gguf.tensors[name].shape != shape:
            raise ModelFormatError(f"{gguf.path}: {name} has the shape {gguf.tensors[name].shape}, not {shape}")
    for name, tensor in gguf.tensors.items():
        if name in required or name in ROPE_TENSORS:
            continue
        if name not in optional:
            raise UnsupportedArchitectureError(f"{gguf.path.name}: the exporter has no use for the tensor {name}")
        if tensor.shape != optional[name]:
            raise ModelFormatError(f"{gguf.path}: {name} has the shape {tensor.shape}, not {optional[name]}")


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
    if not traits.full_attention_every or window <= 0:
        return ()
    key = "attention.sliding_window_pattern"
    if isinstance(gguf.metadata.get(gguf.hparam(key)), GGUFArray):
        flags = gguf.get_array(gguf.hparam(key)).tolist()
        if len(flags) < n_layer:
            raise ModelFormatError(f"{gguf.path}: {key} is for {len(flags)} layers, not {n_layer}")
    else:
        every = gguf.hparam_int(key, traits.full_attention_every)
        flags = [every <= 0 or (layer + 1) % every != 0 for layer in range(n_layer)]
    return tuple(window if flag else 0 for flag in flags[:n_layer])


def _local_base(gguf: GGUFFile, traits: Traits, base: float, rope: RopeScaling) -> float:
    """Base of the windowed layers, 0 where they rotate as the others do."""
    local = gguf.hparam_float("rope.freq_base_swa", traits.local_rope_base or base)
    if not traits.local_rope_base and local == base:
        return 0.0
    if not traits.local_rope_base or rope.magnitude != 1:
        raise UnsupportedArchitectureError(f"{gguf.path.name}: windowed layers with a rotary embedding of their own")
    return local


def _softcap(gguf: GGUFFile, key: str, default: float) -> float:
    cap = gguf.hparam_float(key, default)
    if cap < 0:
        raise ModelFormatError(f"{gguf.path}: {key} is {cap}, not a bound")
    return cap


def _longest_context(gguf: GGUFFile) -> int:
    """Tokens that the graph is right for: attention of which the temperature rises begins to where it begins to."""
    trained = gguf.hparam_int("context_length")
    if gguf.hparam_float("attention.temperature_scale", 0.0) == 0:
        return trained
    return min(trained, gguf.hparam_int("rope.scaling.original_context_length", trained))
