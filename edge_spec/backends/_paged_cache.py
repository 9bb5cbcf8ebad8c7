"""A KV cache in blocks of tokens: which names, shapes and places keys and values of each layer have."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from edge_spec.backends._block_pool import BlockPool, Blocks
from edge_spec.backends._parked_here import ParkedHere
from edge_spec.backends._rotation import turn_keys
from edge_spec.export.architecture import DecoderConfig

BLOCK = 32
"""Tokens in a block; the plugin's own figure, which its attention insists on."""


KV_TYPES: dict[str, DTypeLike] = {"f16": np.float16, "f32": np.float32, "u8": np.uint8}
"""What keys and values can be stored as."""

_SCALES = 8
"""Bytes of a scale and a zero point, float32. With u8 each dimension of the keys in a block has them, behind the
block's tokens, and so has each token's value, behind it. Source: the plugin's executor_pa.cpp."""


class ParkedBlocks:
    """A sequence's table of blocks, kept beside the cache's own; implements `base.Parked`."""

    def __init__(self, cache: PagedCache, table: Blocks, length: int) -> None:
        self._cache = cache
        self._length = length
        self.table: Blocks | None = table

    @property
    def length(self) -> int:
        """Number of its tokens."""
        return self._length

    @property
    def n_bytes(self) -> int:
        """Bytes of the blocks that the cache does not hold, each divided among the parked sequences that hold it."""
        return 0 if self.table is None else self._cache.own_bytes(self.table)

    @property
    def is_free(self) -> bool:
        """Whether it was given back, or is the cache again."""
        return self.table is None

    def free(self) -> None:
        """Give back what nobody else holds."""
        if self.table is not None:
            table, self.table = self.table, None
            self._cache.drop(table)

    def __del__(self) -> None:
        """One that was lost, by an interrupt say, keeps no blocks from others."""
        self.free()


class PagedCache:
    """Keys and values of each layer, [blocks, n_kv_head, 32, head_dim] of a type in KV_TYPES, for `capacity` tokens.

    The cached sequence has a table of the blocks that it is in. Parked sequences have theirs, and what two of them
    begin with is in the same blocks: one that somebody else holds is copied before it is written to. `park_bytes` of
    blocks are for what is parked alone. Memory follows what is held. `n_ctx` decides the rotary embedding where that
    depends on the window.
    """

    def __init__(self, config: DecoderConfig, n_ctx: int, capacity: int, kv: str, park_bytes: int = 0) -> None:
        self._config = config
        self._n_ctx = n_ctx
        self._kv = kv
        self._park_bytes = park_bytes
        self._pool = self._allocate(capacity)
        self._table: Blocks = np.empty(0, np.int32)
        self.parked: ParkedHere[ParkedBlocks] = ParkedHere()
        """Every parked sequence that holds blocks here."""

    def arrays(self) -> Iterator[tuple[str, NDArray[Any]]]:
        """Each array under the name that the graph gives it: `key_cache.0`, `value_cache.0`, …"""
        for index, array in enumerate(self._pool.arrays):
            yield f"{('key', 'value')[index % 2]}_cache.{index // 2}", array

    def use(self, start: int, end: int) -> Blocks:
        """Say that the tokens [start, end) are about to be written; the blocks of the first `end` tokens.

        Raises MemoryError where what is parked leaves no block.
        """
        self._own(start // BLOCK, blocks_of(end))
        return self._table[: blocks_of(end)]

    def forget(self, length: int) -> None:
        """Keep the first `length` tokens. 0 is a way out of whatever was interrupted: blocks are counted anew."""
        if length == 0:
            self._table = np.empty(0, np.int32)
            self._recount()
            return
        kept, gone = np.split(self._table, [blocks_of(length)])
        if len(gone):
            self._table = kept
            self._pool.drop(gone)

    def park(self, length: int) -> ParkedBlocks:
        """Keep the first `length` tokens' blocks as they are, whatever becomes of the cache."""
        table = self._table[: blocks_of(length)]
        self._pool.hold(table)
        return self.parked.add(ParkedBlocks(self, table, length))

    def resume(self, parked: ParkedBlocks) -> None:
        """Put a parked sequence in the place of what is cached; a way out as `forget(0)` is."""
        assert parked.table is not None, "it is still parked"
        self._table, parked.table = parked.table, None
        self._recount()

    def own_bytes(self, table: Blocks) -> int:
        """See `ParkedBlocks.n_bytes`."""
        both = min(len(table), len(self._table))
        own = np.ones(len(table), bool)
        own[:both] = table[:both] != self._table[:both]
        return int(np.sum(self._pool.block_bytes / self._pool.holders[table[own]]))

    def drop(self, table: Blocks) -> None:
        """Give back what a parked sequence alone holds."""
        self._pool.drop(table)

    def evict(self, start: int, end: int, length: int) -> None:
        """Drop tokens [start, end) of `length`; those behind move down, and their keys turn back by as much.

        Not for u8: a token's keys cannot be written there without those beside them in its block. Raises MemoryError
        with the cache as it was.
        """
        source, target = np.arange(end, length), np.arange(start, start + length - end)
        self._own(start // BLOCK, blocks_of(start + length - end))
        table = self._table
        for index, array in enumerate(self._pool.arrays):
            moved = array[table[source // BLOCK], :, source % BLOCK]
            if index % 2 == 0:
                angles = (start - end) * self._config.rope_frequencies(index // 2, self._n_ctx)
                moved = turn_keys(self._config, moved, angles)
            array[table[target // BLOCK], :, target % BLOCK] = moved

    def resize(self, n_ctx: int, capacity: int) -> None:
        """Take blocks for another capacity, with what is held; the old ones go tensor by tensor.

        Not for u8 where the rotary embedding depends on the window, since keys are turned then. Raises MemoryError,
        with everything as it was if there is none for the new blocks. Whatever else stops it, nothing is cached
        afterwards, and what was parked is free.
        """
        pool = self._allocate(capacity)
        try:
            self._move(pool, n_ctx)
        except BaseException:
            for one in self.parked:
                one.table = None
            self.forget(0)
            raise

    def _move(self, pool: BlockPool, n_ctx: int) -> None:
        """Make `pool` the one that holds everything."""
        parked = [one for one in self.parked if one.table is not None]
        tables = [self._table, *(one.table for one in parked if one.table is not None)]
        held = np.unique(np.concatenate(tables))
        pool.take_over(self._pool, held)
        self._turn(pool, [np.searchsorted(held, table) for table in tables], n_ctx)
        self._pool, self._n_ctx = pool, n_ctx
        self._table, *others = (np.searchsorted(held, table).astype(np.int32) for table in tables)
        for one, table in zip(parked, others, strict=True):
            one.table = table

    def _turn(self, pool: BlockPool, tables: list[NDArray[np.intp]], n_ctx: int) -> None:
        """Turn all keys to the rotary embedding of another window. A block has the same place in all of its tables."""
        places = dict(pair for table in tables for pair in zip(table.tolist(), range(len(table)), strict=True))
        blocks, starts = np.array([*places], np.intp), BLOCK * np.array([*places.values()])
        positions = (starts[:, None] + np.arange(BLOCK))[:, None, :, None]
        for layer, keys in enumerate(pool.arrays[::2]):
            old, new = (self._config.rope_frequencies(layer, window) for window in (self._n_ctx, n_ctx))
            if not np.array_equal(old, new):
                keys[blocks] = turn_keys(self._config, keys[blocks], positions * (new - old))

    def _own(self, first: int, end: int) -> None:
        """Make the table `end` blocks long, and those from number `first` on nobody else's. Raises MemoryError."""
        shared = first + np.flatnonzero(self._pool.holders[self._table[first:end]] > 1)
        more = max(0, end - len(self._table))
        if not more and not len(shared):
            return
        fresh = self._pool.take(len(shared) + more)
        table = np.append(self._table, fresh[len(shared) :])
        lent, table[shared] = table[shared], fresh[: len(shared)]
        try:
            self._pool.copy(lent, table[shared])
        except BaseException:
            self._pool.drop(fresh)
            raise
        self._table = table  # before they are dropped: an interrupt between the two loses a block until the next count
        self._pool.drop(lent)

    def _recount(self) -> None:
        """Let the pool know of the tables that there are, and of nobody else's."""
        self._pool.recount([self._table, *(one.table for one in self.parked if one.table is not None)])

    def _allocate(self, capacity: int) -> BlockPool:
        config = self._config
        more = _SCALES if self._kv == "u8" else 0
        count = blocks_of(capacity)
        if self._park_bytes:
            # Once more for what an eviction copies, before the session that limits what is parked can look.
            count += count + self._park_bytes // (BLOCK * token_bytes(config, self._kv))
        key = (count, config.n_kv_head, BLOCK + more, config.head_dim)
        value = (count, config.n_kv_head, BLOCK, config.head_dim + more)
        return BlockPool([key, value] * config.n_layer, KV_TYPES[self._kv])


def token_bytes(config: DecoderConfig, kv: str) -> int:
    """Bytes that a token takes in all layers."""
    size, more = np.dtype(KV_TYPES[kv]).itemsize, _SCALES if kv == "u8" else 0
    heads = config.n_layer * config.n_kv_head
    return heads * (config.head_dim * (BLOCK + more) * size // BLOCK + (config.head_dim + more) * size)


def blocks_of(length: int) -> int:
    """Blocks that so many tokens take."""
    return -(-length // BLOCK)
