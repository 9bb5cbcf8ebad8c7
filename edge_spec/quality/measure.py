"""The whole comparison: the reference first, then every other model, one in memory at a time."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from edge_spec.benchmark.workload import Prompt
from edge_spec.errors import UsageError
from edge_spec.quality.contender import Contender, Name, load
from edge_spec.quality.distributions import compare
from edge_spec.quality.problems import MAX_TOKENS, Problem, complete_all
from edge_spec.quality.reference import Note, Reference, consult, fixed_text
from edge_spec.quality.report import Figures, of_comparison, of_reference
from edge_spec.quality.sandbox import run
from edge_spec.quality.timing import WIDTHS, time_passes
from edge_spec.store import Store
from edge_spec.tokenizer import check_same_vocabulary


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to measure. `problems`: none are put if empty; `text` None is the one that comes with the package."""

    prompts: Sequence[Prompt]
    answer_tokens: int = 64
    problems: Sequence[Problem] = ()
    text: str | None = None
    draft: str | None = None
    """Drafts for the models on onnx while they write programs: the same text, sooner."""
    threads: int = 1
    likeness: bool = True
    """Whether models are compared with the reference on texts; else only programs are."""


def reference_for(source: Path) -> Name:
    """What an export of the GGUF `source` is compared with: the file itself on llama.cpp, else, where that is not
    installed, the closest that an export comes to it."""
    if importlib.util.find_spec("llama_cpp") is not None:
        return Name("llama", str(source))
    return Name("onnx", str(source), "exact")


def measure(
    plan: Plan, reference: Name, others: Sequence[Name], store: Store, note: Note | None = None
) -> list[Figures]:
    """Figures of the reference and of every other model, in this order."""
    if not plan.likeness:
        return [_programs_alone(name, plan, store, note) for name in (reference, *others)]
    folder = store.cache_dir / "quality"
    text = plan.text if plan.text is not None else fixed_text()
    with load(reference, store, threads=plan.threads) as contender:
        said = consult(
            contender,
            plan.prompts,
            answer_tokens=plan.answer_tokens,
            text=text,
            cache_dir=folder,
            note=note,
        )
        if not said.text or not said.answers:
            raise UsageError("nothing to compare: the text and the answers of the reference are empty")
        tokenizer = contender.tokenizer
        own = of_reference(contender.name, contender.recipe, contender.weight_bytes, said)
        rows = [Figures(**own, **_solve(contender, plan, folder, note))]
    for name in others:
        with load(name, store, threads=plan.threads, draft=_draft_for(name, plan)) as contender:
            check_same_vocabulary(tokenizer, contender.tokenizer)
            figures = _compare(contender, said, note) | _solve(contender, plan, folder, note)
            rows.append(
                Figures(name=contender.name, recipe=contender.recipe, weight_bytes=contender.weight_bytes, **figures)
            )
    return rows


def _programs_alone(name: Name, plan: Plan, store: Store, note: Note | None) -> Figures:
    """A model's row without a word on what it is compared with."""
    with load(name, store, threads=plan.threads, draft=_draft_for(name, plan)) as contender:
        solved = _solve(contender, plan, store.cache_dir / "quality", note)
        return Figures(name=contender.name, recipe=contender.recipe, weight_bytes=contender.weight_bytes, **solved)


def _draft_for(name: Name, plan: Plan) -> str | None:
    return plan.draft if plan.problems and name.backend == "onnx" else None


def _compare(contender: Contender, said: Reference, note: Note | None) -> dict[str, Any]:
    if note is not None:
        note(f"{contender.name}: text", 0, 1)
    on_text = compare(contender, said.text, said.on_text)
    if not np.isfinite(on_text.actual).all():
        raise UsageError(f"{contender.name} gives some tokens no probability (a trimmed head?): not to be compared")
    if note is not None:
        note(f"{contender.name}: answers", 0, 1)
    return of_comparison(said, on_text, compare(contender, said.answers, said.on_answers))


def _solve(contender: Contender, plan: Plan, folder: Path, note: Note | None) -> dict[str, Any]:
    """Programs are kept, and run anew every time."""
    if not plan.problems:
        return {}
    key = hashlib.sha256(json.dumps([1, contender.identity, MAX_TOKENS]).encode()).hexdigest()[:16]

    def written(done: int, total: int) -> None:
        if note is not None:
            note(f"{contender.name}: programs", done, total)

    programs = complete_all(contender, plan.problems, folder / f"programs-{key}.jsonl", written)
    passed = [run(problem.program(programs[problem.id])).passed for problem in plan.problems]
    return {"passed": sum(passed), "problems": len(passed)}


def add_times(
    rows: Sequence[Figures], baseline: Name, others: Sequence[Name], store: Store, threads: int
) -> list[Figures]:
    """`rows` with what passes cost: each of `others` in turn with the baseline, in memory at once."""
    timed = []
    for row, name in zip(rows, others, strict=True):
        with ExitStack() as stack:
            names = [name] if name == baseline else [name, baseline]
            contenders = [stack.enter_context(load(one, store, threads=threads)) for one in names]
            for contender in contenders:
                align = getattr(contender.model, "align_rows", None)
                if align is not None:
                    align(None)  # what the weights cost, not what padding does
            own, *base = time_passes(contenders)
        against = base[0] if base else own
        timed.append(replace(row, pass_ms=own, pass_ratio={n: own[n] / against[n] for n in WIDTHS}))
    return timed
