"""What the exporter needs to know of a decoder: its sizes, and which tensors play which part."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_spec.errors import ModelFormatError
from edge_spec.export.traits import TRAITS, Traits


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
    n_ctx_exact: int = 0
    """Tokens that the graph is right for; 0: any number."""
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
        tables: dict[str, NDArray[np.float32]] = {}
        for layer in range(self.n_layer):
            names = self.rope_of(layer)
            if names and names[0] not in tables:
                angles = np.outer(np.arange(rows, dtype=np.float64), self.rope_frequencies(layer, n_ctx))
                turned = np.cos(angles) * self.rope_magnitude, np.sin(angles) * self.rope_magnitude
                tables |= {name: table.astype(np.float32) for name, table in zip(names, turned, strict=True)}
        return tables

    def rope_frequencies(self, layer: int, n_ctx: int) -> NDArray[np.float64]:
        """What each rotary pair of a layer turns by from one position to the next, radians, float64 [rope_dim/2]
        (arXiv 2104.09864), in a cache of `n_ctx` tokens; zeros if the layer does not rotate."""
        names = self.rope_of(layer)
        if not names:
            return np.zeros(self.rope_dim // 2)
        local = names[0] == "cos.local"
        base = self.rope_local_base if local else self.rope_base
        frequencies = base ** (-np.arange(0, self.rope_dim, 2, dtype=np.float64) / self.rope_dim)
        long = self.rope_long_factors is not None and n_ctx > self.rope_short_ctx
        factors = self.rope_long_factors if long else self.rope_factors
        return frequencies if local or factors is None else frequencies / np.asarray(factors, dtype=np.float64)

    @property
    def rope_pairs(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """First and second dimension of each rotary pair, int64 [rope_dim/2] each."""
        dimensions = np.arange(self.rope_dim)
        if self.rope_interleaved:
            return dimensions[0::2], dimensions[1::2]
        return dimensions[: self.rope_dim // 2], dimensions[self.rope_dim // 2 :]

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
