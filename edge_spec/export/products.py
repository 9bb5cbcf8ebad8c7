"""Threads of NumPy's matrix products. Where each of several threads makes products of its own, the library's threads
on top of them only wait for each other."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np

_SET, _GET = "scipy_openblas_set_num_threads64_", "scipy_openblas_get_num_threads64_"
"""As NumPy's wheels name them; another build of NumPy keeps its threads."""


@contextmanager
def one_thread_a_product() -> Iterator[None]:
    """Within the block every product runs on the thread that asks for it, in the whole process; where NumPy's library
    is not the one of its wheels, nothing changes."""
    library = _library()
    if library is None:
        yield
        return
    before = getattr(library, _GET)()
    getattr(library, _SET)(1)
    try:
        yield
    finally:
        getattr(library, _SET)(before)


@cache
def _library() -> ctypes.CDLL | None:
    """The OpenBLAS that came with NumPy and is loaded already."""
    package = Path(np.__file__).parent
    for folder in (package.parent / "numpy.libs", package / ".dylibs"):
        for file in sorted(folder.glob("libscipy_openblas64_*")):
            try:
                library = ctypes.CDLL(str(file))
            except OSError:
                continue
            if hasattr(library, _SET) and hasattr(library, _GET):
                return library
    return None
