"""What the backends with a cache in plain arrays share: dropping, resizing and parking what is cached."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

from numpy.typing import NDArray

from edge_spec.backends._cache_limits import check_evicted, check_exact, check_parks, check_resized
from edge_spec.backends._contiguous_cache import ContiguousCache, ParkedArrays
from edge_spec.backends._padded_model import PaddedModel
from edge_spec.backends._parked_here import ParkedHere
from edge_spec.backends.alignment import MAX_ALIGNMENT
from edge_spec.backends.base import Parked
from edge_spec.export.architecture import DecoderConfig
from edge_spec.types import ModelSpec


def capacity_for(n_ctx: int) -> int:
    """Tokens that a cache needs room for: the padding of the last one too."""
    return n_ctx + MAX_ALIGNMENT - 1


class ContiguousModel(PaddedModel, ABC):
    """The part of `backends.base.CausalLM` that works on a `ContiguousCache` and on nothing else."""

    _cache: ContiguousCache

    def __init__(self, spec: ModelSpec, config: DecoderConfig) -> None:
        super().__init__(spec)
        self.config = config
        self._parked: ParkedHere[ParkedArrays] = ParkedHere()

    @abstractmethod
    def _bind_cache(self) -> None:
        """Work with the cache's arrays and a window of `spec.n_ctx` from now on."""

    @abstractmethod
    def _translated(self, doing: str) -> AbstractContextManager[None]:
        """Turns what the engine raises, and a want of memory, into BackendError."""

    def evict(self, start: int, end: int) -> None:
        """See `CausalLM.evict`; costs a copy of what moves."""
        self._require_open()
        check_evicted(self._spec, start, end, self._length)
        if start < end:
            self._cache.evict(start, end, self._length)
            self._length -= end - start

    def resize(self, n_ctx: int) -> None:
        """See `CausalLM.resize`; a smaller cache is never held beside the larger one."""
        self._require_open()
        check_resized(self._spec, self._length, n_ctx)
        check_exact(self.config, self._spec.name, n_ctx)
        with self._translated(f"a cache of {n_ctx} tokens"):
            self._cache.resize(n_ctx, capacity_for(n_ctx), self._length)
            self._spec = replace(self._spec, n_ctx=n_ctx)
            self._bind_cache()

    @property
    def park_bytes(self) -> int:
        """See `CausalLM.park_bytes`."""
        return self._length * self._spec.kv_bytes_per_token

    def park(self) -> Parked:
        """See `CausalLM.park`; costs a copy."""
        self._require_open()
        check_parks(self._spec)
        with self._translated(f"setting {self._length} tokens aside"):
            return self._parked.add(self._cache.park(self._length))

    def resume(self, parked: Parked) -> None:
        """See `CausalLM.resume`; costs a copy, whose source goes layer by layer."""
        self._require_open()
        taken = self._parked.check(self._spec, parked)
        with self._translated(f"taking {taken.length} tokens up again"):
            self._cache.resume(taken)
        self._length = taken.length

    def swap(self, parked: Parked) -> Parked:
        """See `CausalLM.swap`; layer by layer."""
        self._require_open()
        taken = self._parked.check(self._spec, parked)
        with self._translated(f"setting {self._length} tokens aside"):
            left = self._cache.swap(taken, self._length)
        self._length = taken.length
        return self._parked.add(left)

    def cached_layers(self) -> Iterator[tuple[NDArray[Any], NDArray[Any]]]:
        """Keys and values of each layer as they are stored, [n_kv_head, length, head_dim]; views."""
        for keys, values in zip(self._cache.keys, self._cache.values, strict=True):
            yield keys[0, :, : self._length], values[0, :, : self._length]
