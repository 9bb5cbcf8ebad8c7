"""What a target writes, recorded once, so that drafts can be judged by it without the target."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from edge_spec.benchmark.workload import Prompt
from edge_spec.decoding import Session, SpeculativeDecoder
from edge_spec.drafting import LookupDrafter
from edge_spec.errors import UsageError
from edge_spec.loading import Loader, find_source
from edge_spec.store import Store


@dataclass(frozen=True, slots=True)
class Answer:
    """A prompt and its greedy answer, as ids."""

    task: str
    prompt: list[int]
    ids: list[int]


def record(target: str, prompts: Sequence[Prompt], max_tokens: int, threads: int, file: Path) -> None:
    """Let `target` answer the prompts' first turns, greedily, and write its answers to `file`, one a line; the file is
    there once all are."""
    store = Store()
    source = find_source(store, target)
    loaded = Loader(store=store, backend="onnx", threads=threads).load(source, n_ctx=4096, recipe=None, aligned=True)
    decoder = SpeculativeDecoder(Session(loaded.model), LookupDrafter())
    partial = file.with_name(f"{file.name}.partial")
    with partial.open("w", encoding="utf-8") as out:
        for prompt in prompts:
            ids = source.template.render_ids([{"role": "user", "content": prompt.turns[0]}], source.tokenizer)
            steps = decoder.generate(ids, max_tokens=max_tokens, stop_ids=source.tokenizer.stop_ids)
            answer = Answer(prompt.task, list(ids), [token for step in steps for token in step.tokens])
            out.write(json.dumps(asdict(answer)) + "\n")
    partial.replace(file)
    loaded.model.close()


def read(file: Path) -> list[Answer]:
    """The answers of a file that `record` wrote; UsageError where it is not one."""
    try:
        return [Answer(**json.loads(line)) for line in file.read_text("utf-8").splitlines()]
    except (OSError, ValueError, TypeError) as exc:
        raise UsageError(f"{file} does not hold recorded answers: {exc}") from exc
