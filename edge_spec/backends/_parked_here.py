"""Which parked sequences are a model's own: no other's is ever taken into its cache."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Generic, Protocol, TypeVar
from weakref import WeakSet

from edge_spec.backends._cache_limits import check_resumed
from edge_spec.backends.base import CausalLM, Parked
from edge_spec.types import ModelSpec


class Freeable(Parked, Protocol):
    """A parked sequence that tells whether it is still there."""

    @property
    def is_free(self) -> bool:
        """Whether it was given back, or taken into the cache."""
        ...


ParkedT = TypeVar("ParkedT", bound=Freeable)


class ParkedHere(Generic[ParkedT]):
    """The sequences that one model has parked, as long as somebody holds them."""

    def __init__(self) -> None:
        self._all: WeakSet[ParkedT] = WeakSet()

    def __iter__(self) -> Iterator[ParkedT]:
        """Each of them, the free ones too."""
        return iter(list(self._all))

    def add(self, parked: ParkedT) -> ParkedT:
        """Count one more; returns it."""
        self._all.add(parked)
        return parked

    def check(self, spec: ModelSpec, parked: Parked) -> ParkedT:
        """`parked`, if the model can cache it. Raises what `CausalLM.resume` does."""
        own = next((one for one in self._all if one is parked and not one.is_free), None)
        check_resumed(spec, None if own is None else own.length)
        assert own is not None, "it was checked"
        return own

    def swap(self, model: CausalLM, parked: Parked) -> Parked:
        """`CausalLM.swap`, by `park` and `resume`, of the model whose these are."""
        self.check(model.spec, parked)
        left = model.park()
        model.resume(parked)
        return left

    def free(self) -> None:
        """Free all of them."""
        for parked in self:
            parked.free()
