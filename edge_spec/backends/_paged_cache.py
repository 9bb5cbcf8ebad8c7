"""A KV cache in blocks of tokens: which names, shapes and places keys and values of each layer have."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from edge_spec.backends._block_cache import BlockCache
from edge_spec.backends._rotation import turn_keys
from edge_spec.export.architecture import DecoderConfig

BLOCK = 32
"""Tokens in a block; the plugin's own figure, which its attention insists on."""


KV_TYPES: dict[str, DTypeLike] = {"f32": np.float32, "f16": np.float16, "u8": np.uint8}
"""What keys and values can be stored as."""

_SCALES = 8
"""Bytes of a scale and a zero point, float32. With u8 each dimension of the keys in a block has them, behind the
block's tokens, and so has each token's value, behind it. Source: the plugin's executor_pa.cpp."""


class PagedCache:
    """Keys and values of each layer, [blocks, n_kv_head, 32, head_dim] of a type in KV_TYPES, for `capacity` tokens.

    A sequence's blocks follow each other from the first on. Memory follows what is cached. `n_ctx` decides the rotary
    embedding where that depends on the window.
    """

    def __init__(self, config: DecoderConfig, n_ctx: int, capacity: int, kv: str) -> None:
        self._config = config
        self._n_ctx = n_ctx
        self._kv = kv
        self._blocks = self._allocate(capacity)

    def arrays(self) -> Iterator[tuple[str, NDArray[Any]]]:
        """Each array under the name that the graph gives it: `key_cache.0`, `value_cache.0`, …"""
        for index, array in enumerate(self._blocks.arrays):
            yield f"{('key', 'value')[index % 2]}_cache.{index // 2}", array

    def use(self, length: int) -> int:
        """Say that so many tokens are about to be cached; the number of blocks that they take."""
        self._blocks.use(blocks_of(length))
        return blocks_of(length)

    def forget(self, length: int) -> None:
        """Keep the first `length` tokens; the system gets the memory of the others, if they are many."""
        self._blocks.forget(blocks_of(length))

    def evict(self, start: int, end: int, length: int) -> None:
        """Drop tokens [start, end) of `length`; those behind move down, and their keys turn back by as much.

        Not for u8: a token's keys cannot be written there without those beside them in its block.
        """
        source, target = np.arange(end, length), np.arange(start, start + length - end)
        for index, array in enumerate(self._blocks.arrays):
            moved = array[source // BLOCK, :, source % BLOCK]
            if index % 2 == 0:
                angles = (start - end) * self._config.rope_frequencies(index // 2, self._n_ctx)
                moved = turn_keys(self._config, moved.astype(np.float32), angles)
            array[target // BLOCK, :, target % BLOCK] = moved

    def resize(self, n_ctx: int, capacity: int, length: int) -> None:
        """Take blocks for another capacity, with the first `length` tokens; the old ones go tensor by tensor.

        Not for u8 where the rotary embedding depends on the window, since keys are turned then.
        """
        blocks = self._allocate(capacity)
        blocks.take(self._blocks, blocks_of(length))
        self._blocks = blocks
        positions = np.arange(length)
        for layer, keys in enumerate(blocks.arrays[::2]):
            old, new = (self._config.rope_frequencies(layer, window) for window in (self._n_ctx, n_ctx))
            if not np.array_equal(old, new):
                kept = keys[positions // BLOCK, :, positions % BLOCK].astype(np.float32)
                angles = positions[:, None, None] * (new - old)
                keys[positions // BLOCK, :, positions % BLOCK] = turn_keys(self._config, kept, angles)
        self._n_ctx = n_ctx

    def _allocate(self, capacity: int) -> BlockCache:
        config = self._config
        more = _SCALES if self._kv == "u8" else 0
        key = (blocks_of(capacity), config.n_kv_head, BLOCK + more, config.head_dim)
        value = (blocks_of(capacity), config.n_kv_head, BLOCK, config.head_dim + more)
        return BlockCache([key, value] * config.n_layer, KV_TYPES[self._kv])


def token_bytes(config: DecoderConfig, kv: str) -> int:
    """Bytes that a token takes in all layers."""
    size, more = np.dtype(KV_TYPES[kv]).itemsize, _SCALES if kv == "u8" else 0
    heads = config.n_layer * config.n_kv_head
    return heads * (config.head_dim * (BLOCK + more) * size // BLOCK + (config.head_dim + more) * size)


def blocks_of(length: int) -> int:
    """Blocks that so many tokens take."""
    return -(-length // BLOCK)
