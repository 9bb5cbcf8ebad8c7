"""Find the row padding under which greedy speculation writes bit for bit what plain decoding writes.

A matrix kernel may treat the last row of an odd pass otherwise than a row of a pair, so a token's logits can depend on
how many tokens were decoded beside it. Which padding cures that depends on processor, bits, block and engine version;
so it is measured once and kept.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from edge_spec.backends.base import CausalLM, PaddedRows
from edge_spec.cache_file import CacheFile
from edge_spec.errors import UsageError

ALIGNMENTS = (1, 2, 4)
"""Paddings that are worth trying: kernels work on tiles of up to 4 rows."""
MAX_ALIGNMENT = ALIGNMENTS[-1]

PREFIX, ROWS = 24, 8
WIDTHS = (1, 2, 3, 5)
NONE = "none"


class AlignableLM(CausalLM, PaddedRows, Protocol):
    """A model whose passes can be padded to a multiple of the rows in ALIGNMENTS."""


def check_alignment(alignment: int | None) -> None:
    """UsageError unless it is one of ALIGNMENTS, or None."""
    if alignment is not None and alignment not in ALIGNMENTS:
        raise UsageError(f"row alignment {alignment}: choose one of {ALIGNMENTS}")


def round_up(n: int, multiple: int) -> int:
    """The smallest multiple that is at least n."""
    return -(-n // multiple) * multiple


def align(model: AlignableLM, cache: CacheFile, key: str) -> None:
    """Set the model's row alignment: from `cache` if it knows `key`, else by `find_alignment`, kept there."""
    known = cache.get(key)
    if known not in (*ALIGNMENTS, NONE):
        found = find_alignment(model)
        known = NONE if found is None else found
        cache.put(key, known)
    model.align_rows(None if known == NONE else known)


def find_alignment(model: AlignableLM) -> int | None:
    """The smallest padding with which a row has the same logits in passes of every width, None if there is none.

    Leaves the model empty, with the padding that was tried last.
    """
    tokens = [int(token) for token in np.random.default_rng(0).integers(0, model.spec.n_vocab, PREFIX + ROWS)]
    for alignment in ALIGNMENTS:
        model.align_rows(alignment)
        same = _rows_agree(model, tokens)
        model.rollback(0)
        if same:
            return alignment
    return None


def _rows_agree(model: AlignableLM, tokens: list[int]) -> bool:
    model.rollback(0)
    model.decode(tokens[:PREFIX], rows=0)
    expected = model.decode(tokens[PREFIX:], rows=ROWS).logits.copy()
    for width in WIDTHS:
        model.rollback(PREFIX)
        for start in range(0, ROWS, width):
            part = tokens[PREFIX + start : PREFIX + min(start + width, ROWS)]
            if not np.array_equal(model.decode(part, rows=len(part)).logits, expected[start : start + len(part)]):
                return False
    return True
