"""Programming problems: read, put to a model, and its programs run against the problems' own tests.

The file is one of HumanEval's form (arXiv 2107.03374): JSON lines with `task_id`, `prompt` (imports, a function's head
and docstring), `entry_point` and `test` (a function `check`).
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from edge_spec.decoding.decoder import SpeculativeDecoder
from edge_spec.errors import UsageError
from edge_spec.quality.contender import Contender
from edge_spec.quality.reference import append_line

MAX_TOKENS = 400

_ASKED = "Complete this Python function. Answer with the code alone.\n\n```python\n{prompt}```"
_BEGUN = "```python\n{prompt}"
_ENDS = ("\n```", "\nclass ", "\ndef ", "\n#", "\nif ", "\nprint(", "\nassert ")
"""What ends a function: the end of the code, or a new statement at the margin (the paper's stop strings)."""


@dataclass(frozen=True, slots=True)
class Problem:
    """A function to complete. `test` defines `check(candidate)`, which raises if the function is wrong."""

    id: str
    prompt: str
    entry_point: str
    test: str

    def program(self, completion: str) -> str:
        """Source that ends without an exception exactly if the completed function passes."""
        return f"{self.prompt}{completion}\n\n{self.test}\n\ncheck({self.entry_point})\n"


def read_problems(path: Path) -> list[Problem]:
    """Problems of a file of JSON lines, gzipped if its name ends with .gz; UsageError names the line that is wrong."""
    problems = []
    try:
        stored = path.expanduser().read_bytes()
        lines = (gzip.decompress(stored) if path.suffix == ".gz" else stored).decode().split("\n")
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as exc:
        raise UsageError(f"the problems {path} cannot be read: {exc}") from exc
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            fields = [entry[key] for key in ("task_id", "prompt", "entry_point", "test")]
        except (ValueError, KeyError, TypeError) as exc:
            raise UsageError(f"{path}:{number} is no problem with task_id, prompt, entry_point and test") from exc
        if not all(isinstance(field, str) and field for field in fields) or not fields[2].isidentifier():
            raise UsageError(f"{path}:{number}: task_id, prompt, entry_point and test must be texts")
        problems.append(Problem(*fields))
    if not problems:
        raise UsageError(f"{path} holds no problems")
    return problems


def complete(contender: Contender, problem: Problem) -> str:
    """The function's body as the model writes it, greedily, in its chat template, its answer begun with the prompt."""
    tokenizer = contender.tokenizer
    asked = [{"role": "user", "content": _ASKED.format(prompt=problem.prompt)}]
    ids = contender.template.render_ids(asked, tokenizer) + tokenizer.encode(_BEGUN.format(prompt=problem.prompt))
    decoder = SpeculativeDecoder(contender.session, contender.drafter)
    written: list[int] = []
    for step in decoder.generate(ids, max_tokens=MAX_TOKENS, stop_ids=tokenizer.stop_ids):
        written += step.tokens
        text = cut(tokenizer.decode(written))
        if text is not None:
            return text
    return tokenizer.decode(written)


def cut(text: str) -> str | None:
    """`text` up to what ends a function; None while nothing does."""
    # The first character belongs to the line that the prompt ends with.
    ends = [at for end in _ENDS if (at := ("\n" + text).find(end, 1)) >= 0]
    return text[: min(ends) - 1] if ends else None


def complete_all(
    contender: Contender,
    problems: Sequence[Problem],
    kept: Path | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> dict[str, str]:
    """Completions by problem id. `kept`: a file of JSON lines that holds what was written before, and gets the rest."""
    done: dict[str, str] = {}
    if kept is not None and kept.exists():
        for line in kept.read_text("utf-8").splitlines():
            if not line.endswith("}"):
                continue  # cut short
            entry = json.loads(line)
            done[entry["task_id"]] = entry["completion"]
    for number, problem in enumerate(problems, start=1):
        if problem.id not in done:
            done[problem.id] = complete(contender, problem)
            if kept is not None:
                append_line(kept, {"task_id": problem.id, "completion": done[problem.id]})
        if progress is not None:
            progress(number, len(problems))
    return {problem.id: done[problem.id] for problem in problems}
