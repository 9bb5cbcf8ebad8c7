"""How a file stretches the rotary embedding over a longer context than the one it was first trained on."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edge_spec.errors import ModelFormatError, UnsupportedArchitectureError
from edge_spec.formats.gguf import GGUFFile

Factors = tuple[float, ...]

FREQUENCIES, SHORT, LONG = "rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight"
ROPE_TENSORS = (FREQUENCIES, SHORT, LONG)
"""Tensors that scale frequencies; they become part of the rotary tables, not of the graph."""

_KINDS = ("none", "linear", "yarn", "longrope")


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """`factors` divide each pair's frequency, `long_factors` do where the cache is longer than `short_ctx` tokens
    (0: never), and cosines and sines are multiplied by `magnitude`."""

    factors: Factors | None = None
    long_factors: Factors | None = None
    short_ctx: int = 0
    magnitude: float = 1.0


def read_rope_scaling(gguf: GGUFFile, *, dim: int, base: float) -> RopeScaling:
    """The scaling of `dim` rotary dimensions.

    Knows linear scaling, tables of factors (Llama 3, long-context Phi-3) and YaRN (arXiv 2309.00071); another one is
    an UnsupportedArchitectureError with its name.
    """
    kind = gguf.hparam_str("rope.scaling.type", "linear")
    if kind not in _KINDS:
        raise UnsupportedArchitectureError(
            f"{gguf.path.name}: rope scaling {kind!r}; the exporter knows {', '.join(_KINDS)}"
        )
    stretch = gguf.hparam_float("rope.scaling.factor", gguf.hparam_float("rope.scale_linear", 1.0)) or 1.0
    if stretch < 0:
        raise ModelFormatError(f"{gguf.path}: a rope scaling factor of {stretch}")
    factors, magnitude = np.full(dim // 2, 1.0 if kind == "none" else stretch), 1.0
    if kind == "yarn":
        factors, magnitude = _yarn(gguf, dim, base, stretch)
    magnitude *= gguf.hparam_float("rope.scaling.attn_factor", 1.0)
    if FREQUENCIES in gguf.tensors:
        return RopeScaling(_tuple(factors * _table(gguf, FREQUENCIES, dim)), magnitude=magnitude)
    if LONG in gguf.tensors or SHORT in gguf.tensors:
        short, long = (_tuple(factors * _table(gguf, name, dim)) for name in (SHORT, LONG))
        short_ctx = gguf.hparam_int("rope.scaling.original_context_length", gguf.hparam_int("context_length"))
        return RopeScaling(short, long, short_ctx, magnitude)
    return RopeScaling(None if np.all(factors == 1) else _tuple(factors), magnitude=magnitude)


def _yarn(gguf: GGUFFile, dim: int, base: float, stretch: float) -> tuple[NDArray[np.float64], float]:
    """Divisors that leave quick pairs alone and stretch slow ones, with a ramp between them; and the magnitude."""
    if gguf.hparam_float("rope.scaling.yarn_ext_factor", 1.0) != 1:
        raise UnsupportedArchitectureError(f"{gguf.path.name}: the exporter knows YaRN with an extrapolation of 1 only")
    original = gguf.hparam_int("rope.scaling.original_context_length", gguf.hparam_int("context_length"))
    fast = gguf.hparam_float("rope.scaling.yarn_beta_fast", 32.0)
    slow = gguf.hparam_float("rope.scaling.yarn_beta_slow", 1.0)
    if min(original, fast, slow) <= 0 or base <= 1:
        raise ModelFormatError(f"{gguf.path}: the numbers of its YaRN scaling contradict each other")

    def pair_that_turns(times: float) -> float:
        """Index of the pair that makes so many turns within the original context."""
        return dim * math.log(original / (times * 2 * math.pi)) / (2 * math.log(base))

    low = max(0, math.floor(pair_that_turns(fast)))
    high = min(dim - 1, math.ceil(pair_that_turns(slow)))
    slowness = np.clip((np.arange(dim // 2) - low) / max(0.001, high - low), 0, 1)

    def magnitude(multiplier: float) -> float:
        return 1 + 0.1 * multiplier * math.log(stretch) if stretch > 1 else 1.0

    all_dimensions = gguf.hparam_float("rope.scaling.yarn_log_multiplier", 0.0)
    return 1 / (slowness / stretch + 1 - slowness), magnitude(1.0) / magnitude(all_dimensions)


def _table(gguf: GGUFFile, name: str, dim: int) -> NDArray[np.float64]:
    table = gguf.dequantize(name).reshape(-1).astype(np.float64)
    if table.shape != (dim // 2,) or not np.all(table > 0):
        raise ModelFormatError(f"{gguf.path}: {name} does not fit {dim} rotary dimensions")
    return table


def _tuple(factors: NDArray[np.float64]) -> Factors:
    return tuple(float(value) for value in factors)
