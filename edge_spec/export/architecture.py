"""What the exporter needs to know of a decoder: its sizes, and which tensors play which part."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from edge_spec.errors import ModelFormatError, UnsupportedArchitectureError
from edge_spec.formats.gguf import GGUFFile

SUPPORTED = ("llama", "qwen2")
"""GGUF architectures that the exporter builds (llama includes Mistral and SmolLM2)."""


HEAD_DIM_STEP = 16
"""ONNX Runtime's GroupQueryAttention takes heads of a multiple of so many values."""


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """A decoder of RMS norms, rotary grouped-query attention and a gated SiLU feed-forward network."""

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

    @property
    def qkv_rows(self) -> int:
        """Rows of the fused query, key and value projection."""
        return (self.n_head + 2 * self.n_kv_head) * self.head_dim

    @property
    def head_tensor(self) -> str:
        """Name of the tensor that makes logits."""
        return "token_embd.weight" if self.tied else "output.weight"

    def rope_tables(self, n_ctx: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Cosines and sines, float32 [n_ctx, rope_dim/2] (rotary embedding, arXiv 2104.09864)."""
        frequencies = self.rope_base ** (-np.arange(0, self.rope_dim, 2, dtype=np.float64) / self.rope_dim)
        if self.rope_factors is not None:
            frequencies = frequencies / np.asarray(self.rope_factors, dtype=np.float64)
        angles = np.outer(np.arange(n_ctx, dtype=np.float64), frequencies)
        return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)

    def to_json(self) -> dict[str, Any]:
        """Plain values for the export's metadata."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> DecoderConfig:
        """The inverse of `to_json`; ModelFormatError if fields are missing or unknown."""
        try:
            factors = values["rope_factors"]
            return cls(**{**values, "rope_factors": None if factors is None else tuple(factors)})
        except (KeyError, TypeError) as exc:
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
    if head_dim % HEAD_DIM_STEP:
        raise UnsupportedArchitectureError(
            f"{gguf.path.name}: heads of {head_dim} values; the runtime's attention wants multiples of {HEAD_DIM_STEP}"
        )
    if gguf.hparam_int("expert_count", 0):
        raise UnsupportedArchitectureError(f"{gguf.path.name}: a mixture of experts; the exporter builds dense models")
    embedding = gguf.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise ModelFormatError(f"{gguf.path}: no matrix token_embd.weight")
    rope_dim = gguf.hparam_int("rope.dimension_count", head_dim)
    config = DecoderConfig(
        architecture=architecture,
        n_layer=gguf.hparam_int("block_count"),
        hidden=hidden,
        n_head=n_head,
        n_kv_head=gguf.hparam_int("attention.head_count_kv", n_head),
        head_dim=head_dim,
        n_ff=gguf.hparam_int("feed_forward_length"),
        n_vocab=embedding.shape[0],
        n_ctx_train=gguf.hparam_int("context_length"),
        rms_epsilon=gguf.hparam_float("attention.layer_norm_rms_epsilon"),
        rope_base=gguf.hparam_float("rope.freq_base", 10000.0),
        rope_dim=rope_dim,
        rope_interleaved=architecture == "llama",
        rope_factors=_rope_factors(gguf, rope_dim),
        tied="output.weight" not in gguf.tensors,
    )
    _check_sizes(gguf, config)
    _check_tensors(gguf, config)
    return config


def tensor_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor that the decoder cannot do without, by its GGUF name."""
    queries, keys = config.n_head * config.head_dim, config.n_kv_head * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (config.n_vocab, config.hidden),
        "output_norm.weight": (config.hidden,),
    }
    if not config.tied:
        shapes["output.weight"] = (config.n_vocab, config.hidden)
    for layer in range(config.n_layer):
        block = f"blk.{layer}."
        shapes |= {
            block + "attn_norm.weight": (config.hidden,),
            block + "attn_q.weight": (queries, config.hidden),
            block + "attn_k.weight": (keys, config.hidden),
            block + "attn_v.weight": (keys, config.hidden),
            block + "attn_output.weight": (config.hidden, queries),
            block + "ffn_norm.weight": (config.hidden,),
            block + "ffn_gate.weight": (config.n_ff, config.hidden),
            block + "ffn_up.weight": (config.n_ff, config.hidden),
            block + "ffn_down.weight": (config.hidden, config.n_ff),
        }
    return shapes


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
        if name in required or name == "rope_freqs.weight":
            continue
        if name not in optional:
            raise UnsupportedArchitectureError(f"{gguf.path.name}: the exporter has no use for the tensor {name}")
        if tensor.shape != optional[name]:
            raise ModelFormatError(f"{gguf.path}: {name} has the shape {tensor.shape}, not {optional[name]}")


def _rope_factors(gguf: GGUFFile, rope_dim: int) -> tuple[float, ...] | None:
    scaling = gguf.hparam_str("rope.scaling.type", "none")
    if scaling not in ("none", "linear"):
        raise UnsupportedArchitectureError(f"{gguf.path.name}: rope scaling {scaling!r}; the exporter knows linear")
    factor = gguf.hparam_float("rope.scaling.factor", gguf.hparam_float("rope.scale_linear", 1.0))
    if "rope_freqs.weight" in gguf.tensors:
        table = gguf.dequantize("rope_freqs.weight").reshape(-1)
        if table.shape != (rope_dim // 2,) or not np.all(table > 0):
            raise ModelFormatError(f"{gguf.path}: rope_freqs.weight does not fit {rope_dim} rotary dimensions")
        return tuple(float(value) * factor for value in table)
    return None if factor in (0.0, 1.0) else (factor,) * (rope_dim // 2)
