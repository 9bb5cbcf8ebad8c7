"""Prompts of a workload at keep 0.5, against the whole prompts."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from statistics import median
from typing import Any

from edge_spec import Engine
from edge_spec.types import GenerationResult

TASKS = ("summarization", "rag")
KEEP = 0.5
ROUNDS = 3
ANSWER_TOKENS = 48


def prompts(file: Path, most: int) -> list[tuple[str, str]]:
    """Names and texts of the first prompts of each task."""
    lines = [json.loads(line) for line in file.read_text("utf-8").splitlines() if line.strip()]
    return [
        (line["id"], line["prompt"])
        for task in TASKS
        for line in [line for line in lines if line["task"] == task][:most]
    ]


def compare(engine: Engine, prompt: str) -> dict[str, Any]:
    """Medians of the time to the first token, in turns, from empty caches; and how much of the whole prompt's answer
    the other has: the share of its words (ROUGE-1 recall)."""
    seconds: dict[float | None, list[float]] = {None: [], KEEP: []}
    scoring = []
    for _ in range(ROUNDS):
        for keep, told in seconds.items():
            told.append(_generate(engine, prompt, keep, 1).ttft_s)
        engine.reset()
        scoring.append(engine.condense(prompt, KEEP)[1].seconds)
    whole, kept = (_generate(engine, prompt, keep, ANSWER_TOKENS) for keep in seconds)
    ratio = median(seconds[KEEP]) / median(seconds[None])
    return {
        "tokens": whole.prompt_tokens,
        "kept": kept.prompt_tokens,
        "ttft_s": median(seconds[None]),
        "kept_ttft_s": median(seconds[KEEP]),
        "ratio": ratio,
        "of_it_scoring_s": median(scoring),
        "shared_words": _shared(whole.text, kept.text),
    }


def _generate(engine: Engine, prompt: str, keep: float | None, max_tokens: int) -> GenerationResult:
    engine.reset()
    return engine.generate(prompt, max_tokens=max_tokens, drafter="none", keep=keep)


def _shared(whole: str, kept: str) -> float:
    """Share of the words of `whole` that `kept` has."""
    counts, others = (Counter(re.findall(r"\w+", text.lower())) for text in (whole, kept))
    return sum((counts & others).values()) / max(1, counts.total())
