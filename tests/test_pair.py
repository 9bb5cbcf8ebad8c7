"""The default pair: drafts change its speed and not one bit of its text, and what it writes is of use."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_spec import Engine, GenerationResult

pytestmark = pytest.mark.pair

DRAFTERS = ("lookup", "model", "auto")

PROMPTS = {
    "code": "Write a Python class for a stack with push, pop and peek.",
    "question": "Why do ships float although they are made of steel?",
    "summary": (
        "Summarise this paragraph in two sentences.\n\n"
        "The old mill at the bend of the river ground flour for three villages until the flood of 1911 broke its "
        "wheel. For forty years it stood empty, and children dared each other to climb to its loft. Then a teacher "
        "bought it, mended the wheel with her pupils, and showed that the river could light every lamp in the school. "
        "Today the mill still turns, and the villages that once brought their grain now come to see where their "
        "light is made."
    ),
    "edit": (
        "Rename the variable x to total in this function and change nothing else.\n\n"
        "def add_up(numbers):\n    x = 0\n    for number in numbers:\n        x += number\n    return x\n"
    ),
    "translation": "Translate into German: The train was late, so we drank tea and watched the rain.",
}

MERGE_CASES = [
    [[1, 3, 5], [2, 4, 6]],
    [[], [1, 2]],
    [[1, 2], []],
    [[], []],
    [[1, 1, 2], [1, 3]],
    [[-5, 0], [-7, -6, 9, 10]],
]

CALL_EVERY_FUNCTION = """
import copy, json, sys
code, cases = json.load(sys.stdin)
names = {"__name__": "answer"}
exec(code, names)
functions = [f for n, f in names.items() if callable(f) and getattr(f, "__module__", None) == "answer"]
def works(function):
    try:
        return all(list(function(*copy.deepcopy(case))) == sorted(sum(case, [])) for case in cases)
    except Exception:
        return False
print(any(map(works, functions)))
"""


@pytest.fixture(scope="module")
def engine(target_path: Path, draft_path: Path) -> Iterator[Engine]:
    """As a user loads it, with the exports in the user's store."""
    with Engine.load("qwen2.5-coder") as loaded:
        yield loaded


@pytest.fixture(scope="module")
def plain(engine: Engine) -> dict[str, GenerationResult]:
    return {task: engine.generate(prompt, max_tokens=96, drafter="none") for task, prompt in PROMPTS.items()}


@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize("task", PROMPTS)
def test_greedy_text_is_bit_for_bit_what_the_target_writes_alone(
    engine: Engine, plain: dict[str, GenerationResult], task: str, drafter: str
) -> None:
    result = engine.generate(PROMPTS[task], max_tokens=96, drafter=drafter)
    assert result.token_ids == plain[task].token_ids
    assert result.text == plain[task].text
    assert result.finish_reason == plain[task].finish_reason
    assert drafter != "model" or result.accepted > 0


def test_the_function_that_it_writes_works(engine: Engine) -> None:
    answer = engine.generate("Write a Python function that merges two sorted lists.", max_tokens=400).text
    blocks = re.findall(r"```python\n(.*?)```", answer, re.DOTALL) or [answer]
    assert any(has_a_function_that_merges(block) for block in blocks), answer


def has_a_function_that_merges(code: str) -> bool:
    """Whether some function in `code` merges sorted lists; the code runs in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-I", "-c", CALL_EVERY_FUNCTION],
        input=json.dumps([code, MERGE_CASES]),
        capture_output=True,
        text=True,
        check=False,
        timeout=20,
    )
    return done.returncode == 0 and done.stdout.splitlines()[-1:] == ["True"]
