"""The prompts, and the ids that every contender must read for one of them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from edge_spec.chat_template import ChatTemplate
from edge_spec.formats.gguf import GGUFFile
from edge_spec.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Prompt:
    """One user message of a workload."""

    id: str
    task: str
    text: str


def read_workload(path: Path, tasks: Collection[str], limit: int | None) -> list[Prompt]:
    """Prompts of the named tasks (all if none is named), at most `limit` of each, in the file's order.

    The file has one JSON object a line with `id`, `task` and `prompt`. Raises ValueError with the line's number where
    it has not, and where a task that was named has no prompts.
    """
    prompts: list[Prompt] = []
    seen: Counter[str] = Counter()
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            prompt = Prompt(str(entry["id"]), str(entry["task"]), str(entry["prompt"]))
        except (json.JSONDecodeError, KeyError, TypeError) as exc:
            raise ValueError(f"{path}:{number} is not an object with id, task and prompt ({exc})") from exc
        seen[prompt.task] += not tasks or prompt.task in tasks
        if (not tasks or prompt.task in tasks) and (limit is None or seen[prompt.task] <= limit):
            prompts.append(prompt)
    missing = [task for task in tasks if not seen[task]]
    if missing or not prompts:
        raise ValueError(f"{path} has no prompts of the task {', '.join(missing) or 'asked for'}")
    return prompts


class Reading:
    """What every contender reads for a prompt: the ids that our engine would read, by the GGUF's own tokenizer."""

    def __init__(self, model: Path, system: str | None) -> None:
        with GGUFFile(model) as file:
            self.tokenizer = Tokenizer.from_gguf(file)
            self._template = ChatTemplate.from_gguf(file)
        self._system = system

    def ids(self, prompt: str) -> list[int]:
        """A user's message, after the pair's system message, in the model's chat template."""
        messages = [{"role": "user", "content": prompt}]
        if self._system:
            messages.insert(0, {"role": "system", "content": self._system})
        return self._template.render_ids(messages, self.tokenizer)
