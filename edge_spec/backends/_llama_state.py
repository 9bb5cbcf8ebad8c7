"""A sequence as llama.cpp saves it: for another context, or to be taken up again later."""

from __future__ import annotations

import ctypes
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from edge_spec.backends._llama_context import SEQUENCE
from edge_spec.backends._llama_library import last_reason
from edge_spec.backends._pages import paged_array
from edge_spec.errors import BackendError, BackendMemoryError

State: TypeAlias = NDArray[np.uint8]
"""What llama.cpp saved, bytes; in pages that are the system's again when it goes."""


class ParkedState:
    """A sequence as llama.cpp saves it; implements `base.Parked`."""

    def __init__(self, saved: State, length: int) -> None:
        self.saved: State | None = saved
        self._length = length

    @property
    def length(self) -> int:
        """Number of its tokens."""
        return self._length

    @property
    def n_bytes(self) -> int:
        """Bytes of the copy: nothing is shared."""
        return 0 if self.saved is None else len(self.saved)

    @property
    def is_free(self) -> bool:
        """Whether it was given back, or restored."""
        return self.saved is None

    def free(self) -> None:
        """Give the memory back."""
        self.saved = None


def state_bytes(library: Any, context: Any) -> int:
    """Bytes that `save` would take now."""
    return int(library.llama_state_seq_get_size(context, SEQUENCE))


def save(library: Any, context: Any, name: str) -> State:
    """The sequence's state, a copy. Raises BackendMemoryError, BackendError."""
    size = state_bytes(library, context)
    try:
        saved: State = paged_array((size,), np.uint8)
    except MemoryError as exc:
        raise BackendMemoryError(f"{name}: not enough memory to save its cache: {exc}") from exc
    if library.llama_state_seq_get_data(context, _pointer(saved), size, SEQUENCE) != size:
        raise BackendError(f"{name}: llama.cpp did not save its cache")
    return saved


def restore(library: Any, context: Any, name: str, saved: State) -> None:
    """Read a saved state into the empty cache. Raises BackendError."""
    size = len(saved)
    if library.llama_state_seq_set_data(context, _pointer(saved), size, SEQUENCE) != size:
        raise BackendError(f"{name}: llama.cpp did not restore its cache: {last_reason()}")


def _pointer(state: State) -> Any:
    return state.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
