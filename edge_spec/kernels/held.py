"""Memory that structures of the kernels point to."""

from __future__ import annotations

from typing import Any, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

Floats: TypeAlias = NDArray[np.float32]
_Structures = TypeVar("_Structures")


class Held:
    """Keeps alive what is pointed to."""

    def __init__(self) -> None:
        self._held: list[object] = []

    def at(self, array: NDArray[Any]) -> int:
        """The address of an array."""
        self._held.append(array)
        return int(array.ctypes.data)

    def keep(self, structures: _Structures) -> _Structures:
        """Structures that others point to."""
        self._held.append(structures)
        return structures


def floats(*shape: int) -> Floats:
    """Zeros; pages that are not written take no memory."""
    return np.zeros(shape, np.float32)
