"""The compiled kernels as Python sees them: the structures of `pass.c` and its headers, field by field."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, Structure, c_char_p, c_float, c_int, c_int32, c_int64, c_void_p
from enum import IntEnum
from pathlib import Path
from typing import Any

CHUNK = 128
"""Most tokens of a pass; more are read in several."""
PORTABLE = "portable"
"""What kernels are called that any compiler makes: right everywhere, and slow."""
LANES = 8
"""What rows of shares are rounded up to: whole vectors of every processor."""


MOST_DIM = 16384
"""Numbers of a head, at most: as in `attention.h`."""


class Kind(IntEnum):
    """What a step does."""

    NORM, MULTIPLY, GATE, CACHE, ATTEND, REACH, CAP, TOP = range(8)


class Rows(IntEnum):
    """Which rows of a pass a step works on: all, those that get logits where they are, those once they are moved up."""

    EVERY, PICKED, WANTED = range(3)


class Activation(IntEnum):
    """What a gate is put through."""

    NONE, SILU, GELU = range(3)


def _pointers(*names: str) -> list[tuple[str, Any]]:
    return [(name, c_void_p) for name in names]


def _ints(*names: str) -> list[tuple[str, Any]]:
    return [(name, c_int32) for name in names]


def _floats(*names: str) -> list[tuple[str, Any]]:
    return [(name, c_float) for name in names]


class Activations(Structure):
    """Levels [rows, width], scales [rows, blocks], and shares [rows, lanes]."""

    _fields_ = [*_pointers("levels", "scales", "shares"), *_ints("width", "block", "paired", "blocks", "lanes")]


class Matrix(Structure):
    """Weights, what they are multiplied with, and where the product goes."""

    _fields_ = [
        *_pointers("packed", "scales", "lows", "bias", "out"),
        ("input", POINTER(Activations)),
        *_ints("n_rows", "width", "block", "blocks", "bits", "stride"),
    ]


class Pass(Structure):
    """What differs from pass to pass."""

    _fields_ = [*_ints("n_rows", "past", "n_wanted", "n_threads"), *_pointers("wanted")]


class Norm(Structure):
    """See `norm_step`."""

    _fields_ = [
        *_pointers("x", "branch", "gain", "sum", "out"),
        ("levels", POINTER(Activations) * 2),
        *_ints("width", "x_stride", "rows"),
        *_floats("epsilon"),
    ]


class Multiply(Structure):
    """See `multiply_step`."""

    _fields_ = [("matrices", POINTER(Matrix)), *_ints("n_matrices", "rows")]


class Gate(Structure):
    """See `gate_step`."""

    _fields_ = [*_pointers("gate", "up"), ("levels", POINTER(Activations) * 2), *_ints("stride", "activation", "rows")]


class Attention(Structure):
    """See `attention`."""

    _fields_ = [
        *_pointers("qkv", "query_norm", "key_norm", "cosines", "sines", "keys", "values", "out", "states"),
        *_ints("n_head", "n_kv_head", "head_dim", "rope_dim", "interleaved", "capacity", "window", "is_half"),
        *_floats("epsilon", "scale", "softcap"),
    ]


class Reach(Structure):
    """See `reach_step`."""

    _fields_ = [*_pointers("x", "columns", "bias", "out"), *_ints("width", "n", "stride"), *_floats("cap")]


class Cap(Structure):
    """See `cap_step`."""

    _fields_ = [*_pointers("x"), *_ints("n", "stride"), *_floats("cap")]


class Top(Structure):
    """See `top_step`."""

    _fields_ = [*_pointers("x", "largest", "log_sum", "places"), *_ints("n", "stride", "k")]


class Step(Structure):
    """A kind, and its structure."""

    _fields_ = [("kind", c_int64), ("of", c_void_p)]


class Team(Structure):
    """Where threads meet."""

    _fields_ = [*_ints("arrived", "round"), ("next", c_int32 * 2), *_ints("abandoned", "n_threads")]


_FUNCTIONS = ("edge_spec_run", "edge_spec_zero8", "edge_spec_kernel")


def open_library(path: Path) -> Any:
    """The compiled kernels; OSError where they cannot be loaded, or are something else."""
    library = ctypes.CDLL(str(path))
    if missing := [name for name in _FUNCTIONS if not hasattr(library, name)]:
        raise OSError(f"{path.name} has no {missing[0]}")
    library.edge_spec_run.argtypes = [POINTER(Team), POINTER(Step), c_int, POINTER(Pass)]
    library.edge_spec_run.restype = None
    library.edge_spec_zero8.argtypes = []
    library.edge_spec_zero8.restype = c_int
    library.edge_spec_kernel.argtypes = []
    library.edge_spec_kernel.restype = c_char_p
    return library
