"""A KV cache whose tokens follow each other in one array a layer and kind."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_spec.backends._pages import paged_array
from edge_spec.backends._rotation import turn_keys
from edge_spec.backends.kv_scales import LEVELS, KvScales
from edge_spec.export.architecture import DecoderConfig

Pair = tuple[NDArray[Any], NDArray[Any]]
"""Keys and values of a layer, [1, n_kv_head, tokens, head_dim]."""


class ParkedArrays:
    """Copies of a sequence's keys and values, in pages of their own; implements `base.Parked`.

    `n_ctx` is the window that the keys were rotated for.
    """

    def __init__(self, layers: list[Pair], length: int, n_ctx: int) -> None:
        self.layers = layers
        self.n_ctx = n_ctx
        self._length = length
        self._n_bytes = sum(key.nbytes + value.nbytes for key, value in layers)

    @property
    def length(self) -> int:
        """Number of its tokens."""
        return self._length

    @property
    def n_bytes(self) -> int:
        """Bytes of the copies: nothing is shared."""
        return self._n_bytes if self.layers else 0

    @property
    def is_free(self) -> bool:
        """Whether it was given back, or taken over by a cache."""
        return not self.layers

    def free(self) -> None:
        """Give the memory back."""
        self.layers = []


class ContiguousCache:
    """Keys and values of each layer, [1, n_kv_head, capacity, head_dim], keys with their rotary embedding.

    They are of type `kind`, or int8 where there are `scales` of a step. `n_ctx` decides the rotary embedding where that
    depends on the window; `capacity` tokens have room.
    """

    def __init__(
        self,
        config: DecoderConfig,
        n_ctx: int,
        capacity: int,
        scales: KvScales | None = None,
        *,
        kind: type[np.floating[Any]] = np.float32,
    ) -> None:
        self._config = config
        self._kind = kind if scales is None else np.int8
        self._n_ctx = n_ctx
        self._capacity = capacity
        self._scales = scales
        pairs = [self._allocate(capacity) for _ in range(config.n_layer)]
        self.keys, self.values = [key for key, _ in pairs], [value for _, value in pairs]

    def arrays(self) -> Iterator[tuple[str, NDArray[Any]]]:
        """Each array under the name that the graph gives it: `key.0`, `value.0`, `key.1`, …"""
        for layer in range(self._config.n_layer):
            yield f"key.{layer}", self.keys[layer]
            yield f"value.{layer}", self.values[layer]

    def evict(self, start: int, end: int, length: int) -> None:
        """Drop tokens [start, end) of `length`; those behind move down, and their keys turn back by as much."""
        source, target = slice(end, length), slice(start, start + length - end)
        for layer in range(self._config.n_layer):
            angles = (start - end) * self._config.rope_frequencies(layer, self._n_ctx)
            keys, values = self.keys[layer], self.values[layer]
            keys[:, :, target] = self._turn(layer, keys[:, :, source], angles)
            values[:, :, target] = values[:, :, source].copy()

    def park(self, length: int) -> ParkedArrays:
        """A copy of the first `length` tokens. Raises MemoryError."""
        parked = self._allocate_parked(length)
        for layer, (key, value) in enumerate(parked.layers):
            key[...], value[...] = self.keys[layer][:, :, :length], self.values[layer][:, :, :length]
        return parked

    def resume(self, parked: ParkedArrays) -> None:
        """Copy what was parked to the beginning; the copies go layer by layer."""
        for layer in range(self._config.n_layer):
            self._take(layer, parked)
        parked.free()

    def swap(self, parked: ParkedArrays, length: int) -> ParkedArrays:
        """Park the first `length` tokens and resume others. Pages of no more than a layer are held twice.

        Raises MemoryError with everything as it was: what is allocated takes no memory before it is written.
        RuntimeError if there is none for turning keys in the middle of it.
        """
        fresh = self._allocate_parked(length)
        try:
            for layer, (key, value) in enumerate(fresh.layers):
                key[...], value[...] = self.keys[layer][:, :, :length], self.values[layer][:, :, :length]
                self._take(layer, parked)
        except MemoryError as exc:
            raise RuntimeError("no memory to turn keys with; two sequences are lost") from exc
        finally:
            parked.free()
        return fresh

    def resize(self, n_ctx: int, capacity: int, length: int) -> None:
        """Take arrays of another capacity for the first `length` tokens; the old ones go layer by layer.

        Raises MemoryError with the cache as it was: all of a larger one is allocated first, and a smaller one as the
        old one goes, so that the two are never held together.
        """
        fresh = (self._allocate(capacity) for _ in range(self._config.n_layer))
        positions = np.arange(length)[:, None]
        for layer, (key, value) in enumerate(list(fresh) if capacity > self._capacity else fresh):
            old, new = (self._config.rope_frequencies(layer, window) for window in (self._n_ctx, n_ctx))
            kept = self.keys[layer][:, :, :length]
            unturned = np.array_equal(old, new)
            key[:, :, :length] = kept if unturned else self._turn(layer, kept, positions * (new - old))
            value[:, :, :length] = self.values[layer][:, :, :length]
            self.keys[layer], self.values[layer] = key, value
        self._n_ctx, self._capacity = n_ctx, capacity

    def _allocate_parked(self, length: int) -> ParkedArrays:
        return ParkedArrays([self._allocate(length) for _ in range(self._config.n_layer)], length, self._n_ctx)

    def _take(self, layer: int, parked: ParkedArrays) -> None:
        """One layer of what was parked, whose memory goes; keys are turned where another window rotates otherwise."""
        length = parked.length
        key, value = parked.layers[layer]
        old, new = (self._config.rope_frequencies(layer, window) for window in (parked.n_ctx, self._n_ctx))
        if not np.array_equal(old, new):
            key = self._turn(layer, key, np.arange(length)[:, None] * (new - old))
        self.keys[layer][:, :, :length], self.values[layer][:, :, :length] = key, value
        empty = np.zeros((1, 0, 0, 0), key.dtype)
        parked.layers[layer] = (empty, empty)

    def _allocate(self, capacity: int) -> Pair:
        shape = (1, self._config.n_kv_head, capacity, self._config.head_dim)
        return paged_array(shape, self._kind), paged_array(shape, self._kind)

    def _turn(self, layer: int, keys: NDArray[Any], angles: NDArray[np.float64]) -> NDArray[Any]:
        """Keys [1, n_kv_head, n, head_dim] turned by `angles`; steps are rounded anew."""
        if self._scales is None:
            return turn_keys(self._config, keys, angles)
        step = self._scales[0, layer].reshape(1, self._config.n_kv_head, 1, self._config.head_dim)
        turned = turn_keys(self._config, keys * step, angles)
        stepped: NDArray[np.int8] = np.clip(np.rint(turned / step), -LEVELS, LEVELS).astype(np.int8)
        return stepped
