"""How a checkpoint's config turns and stretches its rotary embedding, as a GGUF of it would say.

Source of every formula: transformers, `modeling_rope_utils.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_spec.checkpoint.folder import positive
from edge_spec.errors import ModelFormatError, UnsupportedArchitectureError

Array = NDArray[np.float32]

_KINDS = ("default", "linear", "llama3", "yarn", "longrope")


@dataclass(frozen=True, slots=True)
class Rotary:
    """`keys` without the architecture's name, and the `tables` that a GGUF keeps as tensors, float32 [dim/2]."""

    keys: dict[str, Any]
    tables: dict[str, Array] = field(default_factory=dict)


def read_rotary(config: Mapping[str, Any], *, head_dim: int, n_ctx_train: int, where: str) -> Rotary:
    """The rotary embedding of a config. `where` names it in errors.

    Raises UnsupportedArchitectureError for another scaling, ModelFormatError for numbers that are none.
    """
    numbers = _Numbers(_parameters(config), where)
    base = numbers.read("rope_theta", positive(config.get("rope_theta"), "rope_theta", where, 10000.0))
    share = positive(config.get("partial_rotary_factor"), "partial_rotary_factor", where, 1.0)
    share = numbers.read("partial_rotary_factor", share)
    dim = int(head_dim * share)
    keys: dict[str, Any] = {"rope.freq_base": base, "rope.dimension_count": dim}
    kind = numbers.values.get("rope_type") or numbers.values.get("type") or "default"
    if kind == "su":  # as the first long Phi-3 called it
        kind = "longrope"
    if kind not in _KINDS:
        raise UnsupportedArchitectureError(f"{where}: rope scaling {kind!r}; known are {', '.join(_KINDS)}")
    if dim < 2 or dim % 2:
        raise ModelFormatError(f"{where}: {dim} rotary dimensions in heads of {head_dim}")
    if kind == "linear":
        return Rotary(keys | {"rope.scaling.type": "linear", "rope.scaling.factor": numbers.read("factor")})
    if kind == "llama3":
        return Rotary(keys, {"rope_freqs.weight": _llama3(numbers, dim, base)})
    if kind == "yarn":
        return Rotary(keys | _yarn(numbers, n_ctx_train))
    if kind == "longrope":
        original = numbers.values.get("original_max_position_embeddings")
        numbers.values["original_max_position_embeddings"] = config.get("original_max_position_embeddings", original)
        return _longrope(numbers, keys, dim, n_ctx_train)
    return Rotary(keys)


def _parameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """The scaling as transformers 5 (`rope_parameters`, perhaps by kind of layer) or 4 writes it."""
    found = config.get("rope_parameters") or config.get("rope_scaling") or {}
    found = found.get("full_attention", found) if isinstance(found, dict) else {}
    return dict(found) if isinstance(found, dict) else {}


@dataclass(frozen=True, slots=True)
class _Numbers:
    """Numbers of a scaling, checked."""

    values: dict[str, Any]
    where: str

    def read(self, name: str, default: float | None = None) -> float:
        """A positive number; ModelFormatError if it is none, or missing without a default."""
        return positive(self.values.get(name), name, self.where, default)

    def table(self, name: str, length: int) -> Array:
        """So many positive numbers."""
        value = self.values.get(name)
        if not isinstance(value, list) or len(value) != length:
            raise ModelFormatError(f"{self.where}: {name} is no list of {length} factors")
        return np.array([positive(entry, name, self.where) for entry in value], np.float32)


def _llama3(numbers: _Numbers, dim: int, base: float) -> Array:
    """Divisors of each pair's frequency: quick pairs stay, slow ones are stretched, with a ramp between them."""
    factor, low, high = (numbers.read(name) for name in ("factor", "low_freq_factor", "high_freq_factor"))
    original = numbers.read("original_max_position_embeddings")
    if high <= low:
        raise ModelFormatError(f"{numbers.where}: high_freq_factor {high} is not above low_freq_factor {low}")
    wavelengths = 2 * math.pi * base ** (np.arange(0, dim, 2, dtype=np.float64) / dim)
    quickness = np.clip((original / wavelengths - low) / (high - low), 0, 1)
    return (1 / ((1 - quickness) / factor + quickness)).astype(np.float32)


def _yarn(numbers: _Numbers, n_ctx_train: int) -> dict[str, Any]:
    """YaRN's numbers (arXiv 2309.00071)."""
    factor = numbers.read("factor")
    if numbers.values.get("truncate") is False:
        raise UnsupportedArchitectureError(f"{numbers.where}: YaRN with a ramp that is not truncated")

    def magnitude(multiplier: float) -> float:
        return 1 + 0.1 * multiplier * math.log(factor) if factor > 1 else 1.0

    said, all_dimensions = numbers.values.get("mscale"), numbers.values.get("mscale_all_dim")
    wanted = magnitude(1.0)
    if said and all_dimensions:
        wanted = magnitude(numbers.read("mscale")) / magnitude(numbers.read("mscale_all_dim"))
    return {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": factor,
        "rope.scaling.original_context_length": int(
            numbers.read("original_max_position_embeddings", float(n_ctx_train))
        ),
        "rope.scaling.yarn_beta_fast": numbers.read("beta_fast", 32.0),
        "rope.scaling.yarn_beta_slow": numbers.read("beta_slow", 1.0),
        # Of itself the reader takes the magnitude of 1.
        "rope.scaling.attn_factor": numbers.read("attention_factor", wanted) / magnitude(1.0),
    }


def _longrope(numbers: _Numbers, keys: dict[str, Any], dim: int, n_ctx_train: int) -> Rotary:
    """Two tables of factors (Phi-3): for contexts up to the original one, and for longer ones."""
    original = numbers.read("original_max_position_embeddings", float(n_ctx_train))
    stretch = n_ctx_train / original
    magnitude = math.sqrt(1 + math.log(stretch) / math.log(original)) if stretch > 1 else 1.0
    tables = {f"rope_factors_{kind}.weight": numbers.table(f"{kind}_factor", dim // 2) for kind in ("short", "long")}
    return Rotary(
        keys
        | {
            "rope.scaling.original_context_length": int(original),
            "rope.scaling.attn_factor": numbers.read("attention_factor", magnitude),
        },
        tables,
    )
