"""Cut a text into what can be left out of it: sentences or lines, and phrases within them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import pairwise

_SENTENCE_END = re.compile(r"(?<=[.!?;])[\"'”’)\]]*\s+(?=[\"'“‘(\[]*[A-Z0-9À-Þ])|(?<=[。！？])|\n+")
_PHRASE_END = re.compile(r"(?<=[,;:)\]])\s+|\s+(?=[(\[])|\s+[–—-]\s+|(?<=[、，；])")
_WORD = re.compile(r"[^\W_]+")
_LONG_PHRASE = 7
"""Words; a longer phrase is cut before a short word, which as a rule begins another one."""
_OPENING = re.compile(r"[^\n:.?!]{1,80}:\s")


@dataclass(frozen=True, slots=True)
class Unit:
    """A piece of a text: characters [start, end), the white space behind them included."""

    start: int
    end: int
    is_kept: bool
    """It says what to do, and never goes."""


def sentences(text: str) -> list[Unit]:
    """The text in sentences or lines, without gaps.

    An opening such as "Summarize:", a first line or sentence, the last one and every question are kept.
    """
    cuts = sorted({0, len(text), *(match.end() for match in _SENTENCE_END.finditer(text))})
    if opening := _OPENING.match(text):
        cuts = sorted({*cuts, opening.end()})
    spans = [(a, b) for a, b in pairwise(cuts) if a < b]
    units = []
    for i, (start, end) in enumerate(spans):
        asks = text[start:end].rstrip().endswith(("?", "？"))
        units.append(Unit(start, end, is_kept=i in (0, len(spans) - 1) or asks))
    return units


def phrases(text: str, unit: Unit) -> list[Unit]:
    """The phrases of a sentence, without gaps."""
    if unit.is_kept:
        return [unit]
    piece = text[unit.start : unit.end]
    cuts = {0, len(piece), *(match.end() for match in _PHRASE_END.finditer(piece))}
    edges = sorted(cuts)
    for start, end in pairwise(edges):
        found = list(_WORD.finditer(piece, start, end))
        since = 0
        for i, word in enumerate(found):
            rest = len(found) - i
            if i - since >= _LONG_PHRASE // 2 and rest >= 2 and (len(word[0]) <= 3 or i - since >= _LONG_PHRASE):
                cuts.add(word.start())
                since = i
    edges = sorted(cuts)
    return [Unit(unit.start + a, unit.start + b, False) for a, b in pairwise(edges) if a < b]


def words(text: str) -> list[str]:
    """The words of a text, in lower case."""
    return [word.lower() for word in _WORD.findall(text)]
