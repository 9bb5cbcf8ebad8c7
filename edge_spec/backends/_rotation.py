"""Turn cached keys, which carry the rotary embedding of their position, to other positions."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_spec.export.architecture import DecoderConfig


def turn_keys(config: DecoderConfig, keys: NDArray[Any], angles: NDArray[np.float64]) -> NDArray[Any]:
    """`keys` [..., head_dim], floats of any size, with each rotary pair turned by `angles` [..., rope_dim/2], radians;
    a copy of their type.

    A rotary embedding is a rotation by position times frequency (arXiv 2104.09864), so a key of position p becomes
    one of position p + d by a further turn by d times the frequency; a magnitude is in the key already.
    """
    first, second = config.rope_pairs
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    left, right = keys[..., first], keys[..., second]
    largest = np.finfo(keys.dtype).max  # stands for what is larger: see `within_f16` of the native kernels
    turned = keys.copy()
    turned[..., first] = np.clip(left * cos - right * sin, -largest, largest)
    turned[..., second] = np.clip(right * cos + left * sin, -largest, largest)
    return turned
