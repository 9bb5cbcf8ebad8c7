"""The prompts of a benchmark: a file of the user's, or the samples that come with the package."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TypeGuard

from edge_spec.errors import UsageError


@dataclass(frozen=True, slots=True)
class Prompt:
    """One conversation to measure: the user's `turns`, the first of which is the prompt."""

    id: str
    task: str
    turns: tuple[str, ...]
    reference: tuple[str, ...] = ()
    """Texts that the answer may copy from."""


def read_workload(path: Path) -> list[Prompt]:
    """Prompts of a file with one JSON object a line, in its order.

    An object has `id`, `task` and `prompt`; `turns`, a list of the user's messages that begins with the prompt, makes
    it a conversation; `reference` lists texts that the answer may copy from. Other keys are left alone. Raises
    UsageError with the line's number where a line is not so.
    """
    try:
        text = path.expanduser().read_text("utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        raise UsageError(f"the workload {path} cannot be read: {exc}") from exc
    return _parse(text, str(path))


def sample_workload() -> list[Prompt]:
    """A few prompts of several tasks, written for this package."""
    file = resources.files("edge_spec.benchmark").joinpath("samples.jsonl")
    return _parse(file.read_text("utf-8"), file.name)


def choose(prompts: Sequence[Prompt], *, tasks: Collection[str] = (), limit: int | None = None) -> list[Prompt]:
    """Prompts of the named tasks (all if none is named), at most `limit` of each.

    Raises UsageError for a task that no prompt is of.
    """
    known = dict.fromkeys(prompt.task for prompt in prompts)
    if unknown := [task for task in tasks if task not in known]:
        raise UsageError(f"no prompts of the task {', '.join(unknown)}: choose among {', '.join(known)}")
    seen: Counter[str] = Counter()
    chosen = []
    for prompt in prompts:
        if not tasks or prompt.task in tasks:
            seen[prompt.task] += 1
            if limit is None or seen[prompt.task] <= limit:
                chosen.append(prompt)
    return chosen


def _parse(text: str, source: str) -> list[Prompt]:
    # Not splitlines(): it would also split at line separators inside a prompt.
    lines = text.split("\n")
    prompts = [_prompt(line, f"{source}:{number}") for number, line in enumerate(lines, start=1) if line.strip()]
    if not prompts:
        raise UsageError(f"{source} holds no prompts")
    return prompts


def _prompt(line: str, place: str) -> Prompt:
    try:
        entry = json.loads(line)
    except ValueError as exc:
        raise UsageError(f"{place} is not JSON: {exc}") from exc
    if not isinstance(entry, dict):
        raise UsageError(f"{place} is not an object with id, task and prompt")
    name, task, prompt = (entry.get(key) for key in ("id", "task", "prompt"))
    if not (_is_text(name) and _is_text(task) and _is_text(prompt)):
        raise UsageError(f"{place} needs id, task and prompt, texts that are not empty")
    for key in ("turns", "reference"):
        texts = entry.get(key, [])
        if not isinstance(texts, list) or not all(map(_is_text, texts)):
            raise UsageError(f"{place}: {key} must be a list of texts that are not empty")
    turns = entry.get("turns") or [prompt]
    if turns[0] != prompt:
        raise UsageError(f"{place}: turns must begin with the prompt")
    return Prompt(name, task, tuple(turns), tuple(entry.get("reference", [])))


def _is_text(value: object) -> TypeGuard[str]:
    return isinstance(value, str) and bool(value.strip())
