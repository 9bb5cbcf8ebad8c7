"""Leave out of a prompt what tells least, before the target pays for reading it.

In two steps, as in LLMLingua (arXiv 2310.05736): word statistics tell the sentences that stay and those worth a
look; the draft model, which reads only the latter, finds the phrases that it could have guessed (selective context,
arXiv 2310.06201).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from edge_spec.context.units import Unit, phrases, sentences, words
from edge_spec.decoding.session import Session
from edge_spec.tokenizer import Tokenizer

Score = Callable[[Sequence[int]], NDArray[np.float64]]
"""Surprisal of each token of a sequence in nats, float64 [n]; 0 for the first."""

_NAMED_BONUS = 3.0
"""Nats that a word of the question adds to the phrase that holds it."""


@dataclass(frozen=True, slots=True)
class Condensed:
    """A text without some of its phrases."""

    text: str
    left_out: tuple[str, ...]
    """What went, in the order of the text."""
    tokens: int
    """How many tokens that were."""


@dataclass(frozen=True, slots=True)
class Surprisal:
    """Keeps the `keep` share of a text's tokens that tell most; what says what to do is kept whatever it tells."""

    keep: float
    looked_at: float = 0.1
    """The draft chooses from a share of the text that is larger than `keep` by this much."""
    sure: float = 0.4
    """Share of what is kept that is not worth a look: the sentences that tell most by their words stay whole."""

    def condense(self, text: str, tokenizer: Tokenizer, score: Score) -> Condensed:
        """The text without what tells least. The tokens of a text are counted as those of its parts."""
        units = sentences(text)
        budget = _Budget(text, tokenizer)
        wanted = int(self.keep * budget.total)
        asked, weights = _asked(text, units), _weights(text, units)
        chosen = _choose(units, weights, budget, int(min(1.0, self.keep + self.looked_at) * budget.total))
        sure = {unit.start for unit in _choose(units, weights, budget, int(self.sure * wanted))}
        pieces = [
            piece
            for unit in chosen
            for piece in ([replace(unit, is_kept=True)] if unit.start in sure else phrases(text, unit))
        ]
        told = _told(text, pieces, asked, tokenizer, score)
        kept = _choose(pieces, told, budget, wanted)
        return _without(text, kept, budget)


class _Budget:
    """Counts tokens by character."""

    def __init__(self, text: str, tokenizer: Tokenizer) -> None:
        ids = tokenizer.encode(text)
        self.total = len(ids)
        self._ends = _char_ends(text, ids, tokenizer)

    def cost(self, unit: Unit) -> int:
        """Tokens that end within the unit."""
        first, behind = np.searchsorted(self._ends, [unit.start, unit.end], side="right")
        return int(behind - first)


def _char_ends(text: str, ids: Sequence[int], tokenizer: Tokenizer) -> NDArray[np.int64]:
    """The character behind each token's last byte, int64 [n]. A space that the vocabulary puts in front is left out."""
    ends = np.array(list(accumulate(len(tokenizer.token_bytes(token)) for token in ids)), np.int64)
    starts = np.array([0, *accumulate(len(char.encode()) for char in text)], np.int64)
    if len(ends):
        ends -= ends[-1] - starts[-1]
    return np.searchsorted(starts, ends, side="left")


def _weights(text: str, units: Sequence[Unit]) -> list[float]:
    """What a sentence tells by its words: how near it is to the text as a whole, and what of the question it names.

    Words count by their rarity among the sentences (inverse document frequency).
    """
    counted = [Counter(words(text[unit.start : unit.end])) for unit in units]
    spread = Counter(word for counts in counted for word in counts)
    rarity = {word: math.log(1 + len(units) / n) for word, n in spread.items()}
    whole = sum((Counter({w: n * rarity[w] for w, n in counts.items()}) for counts in counted), Counter[str]())
    norm = math.sqrt(sum(value**2 for value in whole.values())) or 1.0
    asked = _asked(text, units)
    weights = []
    for counts in counted:
        size = math.sqrt(sum((n * rarity[w]) ** 2 for w, n in counts.items())) or 1.0
        near = sum(n * rarity[w] * whole[w] for w, n in counts.items()) / (size * norm)
        named = sum(rarity[w] for w in counts if w in asked) / (sum(rarity[w] for w in asked if w in rarity) or 1.0)
        weights.append(near + 2 * named)
    return weights


def _asked(text: str, units: Sequence[Unit]) -> set[str]:
    """The longer words of what is kept: those of the question."""
    kept = {word for unit in units if unit.is_kept for word in words(text[unit.start : unit.end])}
    return {word for word in kept if len(word) > 3}


def _told(text: str, pieces: Sequence[Unit], asked: set[str], tokenizer: Tokenizer, score: Score) -> list[float]:
    """Mean surprisal of the tokens of each piece, read one behind the other; those that stay anyway are not read."""
    read = [piece for piece in pieces if not piece.is_kept]
    told = iter(_told_by_draft(text, read, asked, tokenizer, score))
    return [0.0 if piece.is_kept else next(told) for piece in pieces]


def _told_by_draft(
    text: str, pieces: Sequence[Unit], asked: set[str], tokenizer: Tokenizer, score: Score
) -> list[float]:
    joined = "".join(text[piece.start : piece.end] for piece in pieces)
    ids = tokenizer.encode(joined)
    if not ids:
        return [0.0 for _ in pieces]
    surprise, ends = score(ids), _char_ends(joined, ids, tokenizer)
    edges = np.array([0, *accumulate(piece.end - piece.start for piece in pieces)])
    places = np.searchsorted(ends, edges, side="right")
    told = []
    for piece, first, behind in zip(pieces, places, places[1:], strict=False):
        named = sum(word in asked for word in words(text[piece.start : piece.end]))
        told.append(float(surprise[first:behind].mean() if behind > first else 0.0) + _NAMED_BONUS * named)
    return told


def _choose(units: Sequence[Unit], worth: Sequence[float], budget: _Budget, tokens: int) -> list[Unit]:
    """Units worth most, up to `tokens` in all, and those that never go."""
    left = tokens - sum(budget.cost(unit) for unit in units if unit.is_kept)
    chosen = {i for i, unit in enumerate(units) if unit.is_kept}
    for i in sorted(range(len(units)), key=lambda i: -worth[i]):
        cost = budget.cost(units[i])
        if i not in chosen and cost <= left:
            chosen.add(i)
            left -= cost
    return [units[i] for i in sorted(chosen)]


def _without(text: str, kept: Sequence[Unit], budget: _Budget) -> Condensed:
    """The kept units, with a line's end where a gap would join two lines."""
    parts: list[str] = []
    gaps: list[str] = []
    position = tokens = 0
    for unit in [*kept, Unit(len(text), len(text), is_kept=True)]:
        if unit.start > position:
            gap = Unit(position, unit.start, is_kept=False)
            gaps.append(text[position : unit.start].strip())
            tokens += budget.cost(gap)
            newline = "\n" in text[position : unit.start] and not "".join(parts[-1:]).endswith("\n")
            parts.append("\n" if newline and parts else "")
        parts.append(text[unit.start : unit.end])
        position = unit.end
    return Condensed("".join(parts), tuple(gap for gap in gaps if gap), tokens)


def draft_score(session: Session, *, room: int) -> Score:
    """Surprisal by a draft model. Reads texts of more than `room` tokens in parts of that length."""

    def score(ids: Sequence[int]) -> NDArray[np.float64]:
        return np.concatenate(
            [session.score(ids[start : start + room]) for start in range(0, len(ids), room)] or [np.zeros(0)]
        )

    return score
