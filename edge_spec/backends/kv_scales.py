"""Scales of a cache of 8-bit keys and values: measured once on a text, one for every dimension of every head.

ONNX Runtime's attention multiplies cached integers by scales that do not change, so they have to cover what a model
makes of any text. What is larger is cut off at 127 steps.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from numpy.typing import NDArray

from edge_spec.export.architecture import DecoderConfig

if TYPE_CHECKING:
    from edge_spec.backends.onnx import OnnxModel

KvScales: TypeAlias = NDArray[np.float32]
"""Scales of keys and of values, float32 [2, n_layer, n_kv_head * head_dim]; positive."""

LEVELS = 127
MARGIN = 1.25
"""How far past the largest of the measured values the steps reach."""
CHUNK = 128

CALIBRATION_TEXT = """Write a function that merges two sorted lists, explain how long it takes, and add a test.

```python
def merge(left: list[int], right: list[int]) -> list[int]:
    result, i, j = [], 0, 0
    while i < len(left) and j < len(right):
        if left[i] <= right[j]:
            result.append(left[i]); i += 1
        else:
            result.append(right[j]); j += 1
    return result + left[i:] + right[j:]

assert merge([1, 4, 9], [2, 3, 50_000]) == [1, 2, 3, 4, 9, 50_000]
```

Each element is copied once, so the time grows with n + m. In 1987 the harbour of Kiel handled 3.5 million tonnes; the
ferry left at 07:45 and was 12 % late. "Nobody knows," she said, "why the lamp went out." Am Abend regnete es, und die
Straßen glänzten. Le train de 18 h est déjà parti; 東京は今日も雨です。 Solve 3x + 7 = 22: x = (22 - 7) / 3 = 5.

| name | price |
|------|------:|
| tea  |  2.40 |
| rice |  1.15 |

SELECT name, SUM(price) FROM basket WHERE year >= 2019 GROUP BY name; <p class="note">Thanks &amp; goodbye!</p>
{"id": 7, "tags": ["a", "b"], "ok": true, "ratio": -0.003}   for (int i = 0; i < n; ++i) total += a[i] * b[i];
"""
"""Prose, code, numbers, tables and other languages, as a user's message may hold them."""


def measure_scales(model: OnnxModel, tokens: Sequence[int]) -> KvScales:
    """Scales for the keys and values that a model with a float32 cache makes of `tokens`; the model is left empty.

    Dimensions of a rotary pair share one, from the pair's length: a key then fits at every position.
    """
    model.rollback(0)
    for start in range(0, len(tokens), CHUNK):
        model.decode(tokens[start : start + CHUNK], rows=0)
    largest = np.array([_largest(model.config, *layer) for layer in model.cached_layers()], np.float32)
    model.rollback(0)
    scales: KvScales = np.ascontiguousarray(largest.transpose(1, 0, 2)) * np.float32(MARGIN / LEVELS)
    np.maximum(scales, np.finfo(np.float32).tiny, out=scales)
    return scales


def _largest(
    config: DecoderConfig, keys: NDArray[np.float32], values: NDArray[np.float32]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The largest magnitude of each dimension, [n_kv_head * head_dim], of keys and values [n_kv_head, n, head_dim]."""
    first, second = config.rope_pairs
    lengths = np.abs(keys)
    lengths[..., first] = lengths[..., second] = np.hypot(keys[..., first], keys[..., second])
    return lengths.max(1).ravel(), np.abs(values).max(1).ravel()


def read_scales(path: Path, config: DecoderConfig) -> KvScales | None:
    """What `write_scales` wrote, None if there is nothing there that fits the model."""
    try:
        scales = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    shape = (2, config.n_layer, config.n_kv_head * config.head_dim)
    fits = scales.dtype == np.float32 and scales.shape == shape and np.isfinite(scales).all() and (scales > 0).all()
    return scales if fits else None


def write_scales(path: Path, scales: KvScales) -> None:
    """Keep scales for the next time; where they cannot be written they are measured again."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".npy", delete=False) as file:
            np.save(file, scales)
        Path(file.name).replace(path)
    except OSError:
        return
