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
ANSWER_TOKENS = 32


def prompts(file: Path, most: int) -> list[tuple[str, str]]:
    """Names and texts of the first prompts of each task."""
    lines = [json.loads(line) for line in file.read_text("utf-8").splitlines() if line.strip()]
    return [
        (line["id"], line["prompt"])
        for task in TASKS
        for line in [line for line in lines if line["task"] == task][:most]
    ]


def compare(engine: Engine, prompt: str, rounds: int) -> dict[str, Any]:
    """The time to the first token, whole and kept in turns, from empty caches: medians of the rounds.

    And how much of the whole prompt's answer the other has: the share of its words (ROUGE-1 recall).
    """
    results: dict[float | None, list[GenerationResult]] = {None: [], KEEP: []}
    for number in range(rounds):
        for keep, done in results.items():
            engine.reset()
            done.append(engine.generate(prompt, max_tokens=1 if number else ANSWER_TOKENS, drafter="none", keep=keep))
    whole_s, kept_s = (median(result.ttft_s for result in done) for done in results.values())
    whole, kept = (done[0] for done in results.values())
    return {
        "tokens": whole.prompt_tokens,
        "kept": kept.prompt_tokens,
        "ttft_s": whole_s,
        "kept_ttft_s": kept_s,
        "ratio": kept_s / whole_s,
        "shared_words": _shared(whole.text, kept.text),
    }


def _shared(whole: str, kept: str) -> float:
    """Share of the words of `whole` that `kept` has."""
    counts, others = (Counter(re.findall(r"\w+", text.lower())) for text in (whole, kept))
    return sum((counts & others).values()) / max(1, counts.total())
