"""Find the row padding under which greedy speculation writes bit for bit what plain decoding writes.

A matrix kernel may treat the last row of an odd pass otherwise than a row of a pair, so a token's logits can depend on
how many tokens were decoded beside it. Which padding cures that depends on processor, bits, block and engine version;
so it is measured once and kept.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np

from edge_spec.backends.onnx import ALIGNMENTS, OnnxModel

PREFIX, ROWS = 24, 8
WIDTHS = (1, 2, 3, 5)


def align(model: OnnxModel, cache_file: Path, key: str) -> None:
    """Set the model's row alignment: from `cache_file` if it knows `key`, else by `find_alignment`, kept there.

    A cache that cannot be read or written costs the measurement again and nothing else.
    """
    known = _read(cache_file)
    if key not in known:
        known[key] = find_alignment(model)
        _write(cache_file, known)
    model.align_rows(known[key])


def find_alignment(model: OnnxModel) -> int | None:
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


def _rows_agree(model: OnnxModel, tokens: list[int]) -> bool:
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


def _read(cache_file: Path) -> dict[str, int | None]:
    try:
        known = json.loads(cache_file.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return {k: v for k, v in known.items() if v is None or v in ALIGNMENTS} if isinstance(known, dict) else {}


def _write(cache_file: Path, known: dict[str, int | None]) -> None:
    partial = cache_file.with_name(f"{cache_file.name}.{os.getpid()}.partial")
    try:
        cache_file.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(known, indent=2), "utf-8")
        partial.replace(cache_file)
    except OSError:
        partial.unlink(missing_ok=True)
