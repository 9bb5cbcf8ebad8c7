"""Cut special tokens out of text, and keep users' text from turning into them."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

_C_SPACE = " \t\n\v\f\r"

Fragment: TypeAlias = str | int
"""Plain text, or the id of a special token."""

_Piece: TypeAlias = tuple[int, int, int]
"""Start and end in the text, and the special token that stands there, or -1."""


class _Special(NamedTuple):
    id: int
    text: str
    is_control: bool
    swallows_space: bool


class SpecialTokens:
    """Special tokens, longest first: the order in which llama.cpp cuts them out, each from all that is left."""

    def __init__(self, texts: Mapping[int, str], control: Collection[int], swallow_space: Collection[int] = ()) -> None:
        """`texts` by id; those in `control` are cut only on demand; `swallow_space` take the white space after them."""
        order = sorted(texts, key=lambda i: (-len(texts[i].encode()), i))
        self._order = [_Special(i, texts[i], i in control, i in swallow_space) for i in order]
        self.control_texts = tuple(texts[i] for i in order if i in control)

    def cut(self, text: str, *, special: bool, shielded: Sequence[int] = ()) -> list[Fragment]:
        """Split `text` into fragments. No control token covers a position in `shielded` (ascending)."""
        pieces: list[_Piece] = [(0, len(text), -1)] if text else []
        for token in self._order:
            if (special or not token.is_control) and token.text in text:
                shield = shielded if token.is_control else ()
                pieces = [new for piece in pieces for new in _cut_one(text, piece, token, shield)]
        return [text[start:end] if token < 0 else token for start, end, token in pieces]


def _cut_one(text: str, piece: _Piece, token: _Special, shielded: Sequence[int]) -> Iterator[_Piece]:
    start, end, kind = piece
    search = start
    while kind < 0 and (found := text.find(token.text, search, end)) >= 0:
        search = found + 1
        after = found + len(token.text)
        if bisect_left(shielded, found) < bisect_left(shielded, after):
            continue
        if found > start:
            yield start, found, -1
        yield found, after, token.id
        while token.swallows_space and after < end and text[after] in _C_SPACE:
            after += 1
        start = search = after
    if kind >= 0 or start < end:
        yield start, end, kind


@dataclass(frozen=True, slots=True)
class Shield:
    """Marks in a text what must not become a control token, in a way that survives a chat template.

    The character after a `mark` belongs to no control token. A mark goes before whatever looks like one, and before
    the first or last character of the text where that could complete one together with what the template puts beside
    it. Other text is left alone, so a template sees it as it is.
    """

    mark: str
    _whole: re.Pattern[str]
    _heads: frozenset[str]
    _tails: frozenset[str]
    _longest: int

    @classmethod
    def against(cls, control_texts: Sequence[str], avoid: str) -> Shield:
        """A shield against these tokens, with a private-use mark that does not occur in `avoid`."""
        mark = next(char for char in map(chr, range(0x10FFFD, 0xF0000, -1)) if char not in avoid)
        pattern = "|".join(re.escape(text) for text in control_texts) or r"(?!)"
        parts = [(text[:i], text[i:]) for text in control_texts for i in range(1, len(text))]
        heads, tails = frozenset(head for head, _ in parts), frozenset(tail for _, tail in parts)
        return cls(mark, re.compile(f"(?={pattern})"), heads, tails, max(map(len, control_texts), default=0))

    def protect(self, text: str) -> str:
        """The text with its marks."""
        places = {match.start() for match in self._whole.finditer(text)}
        bare = text.strip()
        first = len(text) - len(text.lstrip())
        reach = range(1, self._longest)
        for part, place in ((text, 0), (bare, first)):
            if any(part[:n] in self._tails for n in reach):
                places.add(place)
        for part, place in ((text, len(text) - 1), (bare, first + len(bare) - 1)):
            if any(part[-n:] in self._heads for n in reach):
                places.add(place)
        cuts = sorted(places)
        return self.mark.join(text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True))

    def remove(self, text: str) -> tuple[str, list[int]]:
        """The text without marks, and the positions in it (ascending) that they shield."""
        parts = text.split(self.mark)
        places, length = [], 0
        for part in parts[:-1]:
            length += len(part)
            places.append(length)
        return "".join(parts), places
