"""What the backends that run a graph share: a length, and passes that are padded to a multiple of rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from edge_spec.backends._cache_limits import check_kept
from edge_spec.backends.alignment import MAX_ALIGNMENT, check_alignment, round_up
from edge_spec.errors import UsageError
from edge_spec.types import ModelSpec

SCORED_BYTES = 8 << 20
"""Logits that a scored pass may hold."""


def scored_rows(width: int, max_rows: int) -> int:
    """Tokens of a scored pass, whole paddings of them, whose rows have `width` logits: at most 64, at least `max_rows`,
    which are whole paddings too."""
    return max(max_rows, min(64, SCORED_BYTES // (4 * width)) // MAX_ALIGNMENT * MAX_ALIGNMENT)


class PaddedModel:
    """The part of `backends.base.CausalLM` and `PaddedRows` that does not depend on what runs the graph.

    Passes are not padded until `align_rows` says so: a pass then costs what its rows cost, and equal bits are not
    promised.
    """

    def __init__(self, spec: ModelSpec) -> None:
        self._spec = spec
        self._length = 0
        self._padding = 1
        self._is_open = True

    @property
    def spec(self) -> ModelSpec:
        """Sizes and capabilities."""
        return self._spec

    @property
    def length(self) -> int:
        """Cached tokens."""
        return self._length

    def rollback(self, length: int) -> None:
        """See `CausalLM.rollback`; any length."""
        self._require_open()
        check_kept(length, self._length)
        self._length = length

    def align_rows(self, alignment: int | None) -> None:
        """Pad each pass to a multiple of `alignment` rows from now on, or (None) not at all.

        `edge_spec.backends.alignment` finds the smallest one that keeps its promise on a machine.
        """
        check_alignment(alignment)
        self._padding = alignment or 1
        self._spec = replace(self._spec, row_alignment=alignment)

    def _require_open(self) -> None:
        if not self._is_open:
            raise UsageError(f"{self._spec.name} is closed")

    def _padded(self, tokens: Sequence[int]) -> NDArray[np.int64]:
        """The ids of a pass; token 0 pads. UsageError for an id that the model does not know."""
        ids = np.zeros(round_up(len(tokens), self._padding), np.int64)
        ids[: len(tokens)] = tokens
        if ids.min() < 0 or ids.max() >= self._spec.n_vocab:
            raise UsageError(f"a token id is outside the vocabulary of {self._spec.n_vocab}")
        return ids

    def _wanted(self, n: int, rows: int) -> NDArray[np.int64]:
        """Which rows of a pass of `n` tokens the head scores: the last `rows`, and the very last again as padding."""
        wanted = np.full(round_up(max(rows, 1), self._padding), n - 1, np.int64)
        wanted[:rows] = np.arange(n - rows, n)
        return wanted
