"""Texts in which the end of a context can be looked up: an index that is built once and searched at every step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

_ID_BITS = 21
_BETWEEN = (1 << _ID_BITS) - 1
"""Stands between the texts. No vocabulary is that large, so no match and no copy crosses it."""
_MAX_CANDIDATES = 16
"""Places that one search looks at, latest first: bounds its cost where the same few tokens are everywhere."""
_LONG_ENOUGH = 32
"""A match of this many tokens is not measured further."""


class Corpus:
    """An index of texts, given as ids, by every run of `order` tokens (1 to 3) in them; later texts count as newer.

    Runs are packed into integers and sorted: building takes n log n, a search a few comparisons, and a token of text
    16 bytes. `order` is the shortest match that can be found.
    """

    def __init__(self, texts: Iterable[Sequence[int] | NDArray[np.int32]], *, order: int) -> None:
        assert 1 <= order * _ID_BITS <= 63
        self._order = order
        self._tokens = _joined(texts)
        num_runs = max(0, len(self._tokens) - order + 1)
        keys = np.zeros(num_runs, np.int64)
        for i in range(order):
            keys = keys << _ID_BITS | self._tokens[i : i + num_runs]
        # Stable, so that the places of a run are in the order of the text.
        places = np.argsort(keys, kind="stable")
        self._keys = keys[places]
        self._places = places.astype(np.int32)

    def __len__(self) -> int:
        """Tokens of all texts and what stands between them."""
        return len(self._tokens)

    def find(self, context: Sequence[int]) -> tuple[int, int]:
        """The position behind the longest match of the context's end, and the match's length; (0, 0) without one.

        Of equally long matches the latest counts. A match at the very end of a text has nothing to copy, and is none.
        """
        order = self._order
        if len(context) < order or not len(self._keys):
            return 0, 0
        tail = list(context[-_LONG_ENOUGH:])
        key = 0
        for token in tail[-order:]:
            key = key << _ID_BITS | token
        first, behind = self._keys.searchsorted(key, "left"), self._keys.searchsorted(key, "right")
        best_end, best_length = 0, 0
        for place in self._places[max(first, behind - _MAX_CANDIDATES) : behind][::-1].tolist():
            end = place + order
            if self._tokens[end] == _BETWEEN:
                continue
            length = _common_suffix(self._tokens[max(0, end - len(tail)) : end].tolist(), tail)
            if length > best_length:
                best_end, best_length = end, length
            if best_length >= len(tail):
                break
        return best_end, best_length

    def read(self, position: int, count: int) -> list[int]:
        """Up to `count` tokens from `position` on, to the end of their text."""
        tokens: list[int] = self._tokens[position : position + count].tolist()
        return tokens[: tokens.index(_BETWEEN)] if _BETWEEN in tokens else tokens


def _joined(texts: Iterable[Sequence[int] | NDArray[np.int32]]) -> NDArray[np.int32]:
    """All texts, each followed by the mark that ends it."""
    between = np.array([_BETWEEN], np.int32)
    parts = [part for text in texts for part in (np.asarray(text, np.int32), between)]
    return np.concatenate(parts) if parts else np.zeros(0, np.int32)


def _common_suffix(one: Sequence[int], other: Sequence[int]) -> int:
    length = 0
    for left, right in zip(reversed(one), reversed(other), strict=False):
        if left != right:
            break
        length += 1
    return length
