"""Made-up texts: filler that says little, and facts that can be asked for. The same seed makes the same text."""

from __future__ import annotations

import random
from dataclasses import dataclass

_NAMES = ("Ada", "Bruno", "Chiara", "Dmitri", "Elif", "Farid", "Greta", "Hugo", "Ines", "Jonas")
_THINGS = ("lamp", "kettle", "violin", "globe", "ladder", "anchor", "mirror", "saddle", "clock", "basket")
_PLACES = ("Bergen", "Lagos", "Quito", "Turin", "Perth", "Oslo", "Cairo", "Lima", "Kyoto", "Ghent")
_FILLER = (
    "The morning was grey and the street was quiet, as it mostly is at that time of the year.",
    "Somebody had left a window open, and the curtain moved a little in the wind.",
    "The bus was late again, which surprised nobody who had waited for it before.",
    "There was talk of rain in the afternoon, but the sky kept its mind to itself.",
    "An old radio played in the next room, and it was hard to tell which station it was.",
    "The bread was still warm when the first customers came in and stood at the counter.",
    "On the wall hung a calendar that showed the wrong month, and had done so for a while.",
    "People walked past without looking up, each of them busy with something of their own.",
    "The river was low, and children threw stones from the bridge to hear them splash.",
    "A dog slept in the doorway and did not care who had to step over it.",
)


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt's end, and what a right answer contains."""

    text: str
    answer: str


def filler(sentences: int, seed: int) -> list[str]:
    """Sentences in which nothing happens."""
    rng = random.Random(seed)
    return [rng.choice(_FILLER) for _ in range(sentences)]


def fact(number: int) -> tuple[str, Question]:
    """A sentence that says something, and the question for it."""
    name, thing, place = _NAMES[number % 10], _THINGS[(3 * number) % 10], _PLACES[(7 * number) % 10]
    code = str(1000 + 7919 * (number + 1) % 9000)
    said = f"{name} keeps a {thing} in {place}, and its number is {code}."
    return said, Question(
        f"What is the number of the {thing} that {name} keeps in {place}? Give the number only.", code
    )


def needle(depth: int, sentences: int) -> tuple[str, Question]:
    """A fact at one of ten depths of a long text."""
    said, question = fact(depth)
    text = filler(sentences, seed=depth)
    text.insert(round(depth / 9 * sentences), said)
    return "Read this text.\n" + " ".join(text) + "\n" + question.text, question


def problem(number: int, sentences: int) -> tuple[str, Question]:
    """A question of code (even numbers) or of sums (odd ones) whose facts stand in a long text."""
    text = filler(sentences, seed=100 + number)
    middle = sentences // 2
    if number % 2 == 0:
        factor, offset, given = 3 + number, 5 + 2 * number, 4 + number
        code = f"\ndef scale(x):\n    y = x * {factor}\n    return y + {offset}\n"
        text.insert(middle, code)
        return _asked(text, f"What does scale({given}) return? Give the number only.", given * factor + offset)
    apples, pears = 12 + number, 30 + 3 * number
    text.insert(middle // 2, f"In the cellar there are {apples} apples.")
    text.insert(middle + 2, f"In the attic there are {pears} pears.")
    return _asked(text, "How many apples and pears are there together? Give the number only.", apples + pears)


def _asked(text: list[str], question: str, answer: int) -> tuple[str, Question]:
    return "Read this text.\n" + " ".join(text) + "\n" + question, Question(question, str(answer))
