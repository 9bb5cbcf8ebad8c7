"""What is lost and what is won when a context is pruned: one report for a target and its draft.

    python tools/pruning.py --json report.json

Needles at ten depths of a long text, recall of facts told over ten turns, questions of code and sums in long texts, and
perplexity behind a text; each for the policies at keep ratios 0.75, 0.5 and 0.25, with the seconds to the first token
and the memory of the cache that was not needed. Twenty turns at a quarter of the window, against reading the pruned
context every turn. And prompts of the workloads, read whole and condensed by turns. The texts are made up
(`pruning_report/texts.py`), this project's own pages, or read by path (`--workload`). Greedy, drafts off, from empty
caches.

Each row is kept in the file of `--json` as soon as it is there: the same command goes on where it was ended, by hand or
by `--minutes`. `--full` takes texts of three times the length, and has no limit of time.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pruning_report import chat, workload
from pruning_report.figures import Figures, summary, table
from pruning_report.policies import Outcome, answer, perplexity, recall
from pruning_report.texts import Question, fact, needle, problem

from edge_spec import Engine

RATIOS = (0.75, 0.5, 0.25)
SECTIONS = ("chat", "workload", "perplexity", "needle", "problems", "recall")
MINUTES = 12.0
_PAGE = Path(__file__).parents[1] / "docs" / "design.md"
_SETUP = ("pair", "target", "draft", "backend", "sentences", "limit", "scored", "window", "padding")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the sections that were asked for; prints each row as soon as it is done. 0: nothing is left to be done."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.sentences is None:
        options.sentences = 48 if options.full else 16
    if options.minutes is None and not options.full:
        options.minutes = MINUTES
    sections = options.sections.split(",")
    if unknown := set(sections) - set(SECTIONS):
        parser.error(f"no such section: {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}")
    try:
        figures = Figures(options.json, {name: getattr(options, name) for name in _SETUP}, options.minutes)
    except ValueError as exc:
        parser.error(str(exc))
    with Engine.load(
        options.pair,
        target=options.target,
        draft=options.draft,
        backend=options.backend,
        n_ctx=4096 if options.full else 2048,
        threads=options.threads,
    ) as engine:
        engine.generate("Say hello.", max_tokens=2, drafter="none")
        for section in sections:
            _run(section, engine, options, figures)
    print(table(figures.report))
    print("\n".join(["", *summary(figures.report)]))
    if figures.num_left:
        print(f"{figures.num_left} rows are left: the same command goes on with them", file=sys.stderr)
    return 1 if figures.num_left else 0


def _run(section: str, engine: Engine, options: argparse.Namespace, figures: Figures) -> None:
    size, count = options.sentences, options.limit
    if section == "needle":
        _prompts(engine, section, [needle(depth, size) for depth in range(10)][:count], figures)
    elif section == "problems":
        _prompts(engine, section, [problem(number, size) for number in range(6)][:count], figures)
    elif section == "recall":
        facts = [fact(number) for number in range(10)][:count]
        _rows(
            section,
            lambda policy, keep: _figures(engine, recall(engine, policy, keep, facts)),
            ("turns", "sinks"),
            figures,
        )
    elif section == "perplexity":
        text = _PAGE.read_text("utf-8")[: 60 * size * 2]

        def row(policy: str, keep: float) -> dict[str, Any]:
            value, dropped = perplexity(engine, policy, keep, text, scored=options.scored)
            return {"perplexity": value, "saved_mib": _mib(engine, dropped)}

        _rows(section, row, ("surprisal", "sinks"), figures)
    elif section == "workload":
        if options.workload is None:
            print("workload: no file was named, so nothing is read (--workload)", file=sys.stderr)
            return
        for name, prompt in workload.prompts(options.workload, options.prompts):
            _row(section, name, lambda prompt=prompt: workload.compare(engine, prompt, options.rounds), figures)  # type: ignore[misc]
    else:
        _row(
            section,
            f"{chat.TURNS} turns",
            lambda: asdict(chat.measure(engine, window=options.window, padding=options.padding)),
            figures,
        )


def _prompts(engine: Engine, section: str, prompts: list[tuple[str, Question]], figures: Figures) -> None:
    def row(policy: str, keep: float) -> dict[str, Any]:
        outcome = Outcome()
        for prompt, question in prompts:
            outcome.add(answer(engine, policy, keep, prompt), question)
        return _figures(engine, outcome)

    _rows(section, row, ("surprisal", "sinks"), figures)


def _figures(engine: Engine, outcome: Outcome) -> dict[str, Any]:
    return {
        "right": outcome.right,
        "of": outcome.asked,
        "ttft_s": outcome.ttft_s,
        "saved_mib": _mib(engine, outcome.dropped_tokens),
    }


def _mib(engine: Engine, tokens: float) -> float:
    return tokens * engine.spec.kv_bytes_per_token / 2**20


def _rows(section: str, run: Callable[[str, float], dict[str, Any]], policies: Sequence[str], figures: Figures) -> None:
    """One row for the whole context, then one a policy and ratio."""
    for policy, keep in [("full", 1.0), *((policy, keep) for policy in policies for keep in RATIOS)]:
        _row(section, f"{policy} {keep}", lambda policy=policy, keep=keep: run(policy, keep), figures)  # type: ignore[misc]


def _row(section: str, name: str, run: Callable[[], dict[str, Any]], figures: Figures) -> None:
    """One row, unless it is there already or time is up; printed as it comes."""
    if figures.row(section, name) is not None or not figures.may_begin():
        return
    row = run()
    figures.put(section, name, row)
    print(f"{section} | {name} | {json.dumps(row)}", flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="What pruning a context costs and saves.")
    parser.add_argument("--pair", help="a pair by name (default: the default pair)")
    parser.add_argument("--target")
    parser.add_argument("--draft")
    parser.add_argument("--backend", default="onnx")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--sections", default=",".join(SECTIONS))
    parser.add_argument("--sentences", type=int, help="length of the long texts (default: 16, with --full 48)")
    parser.add_argument("--limit", type=int, default=10, help="most questions a section")
    parser.add_argument("--scored", type=int, default=97, help="tokens whose perplexity is taken")
    parser.add_argument("--window", type=int, default=272, help="window of the chat of twenty turns")
    parser.add_argument("--padding", type=int, default=1, help="filler sentences of each of its questions")
    parser.add_argument("--workload", type=Path, help="a file of prompts, a JSON object a line: task, id, prompt")
    parser.add_argument("--prompts", type=int, default=6, help="most prompts of each task of the workload")
    parser.add_argument("--rounds", type=int, default=1, help="times that each of them is read")
    parser.add_argument("--minutes", type=float, help=f"begin no row after so long (default: {MINUTES:.0f})")
    parser.add_argument("--full", action="store_true", help="longer texts, and no limit of time")
    parser.add_argument("--json", type=Path, help="keep the figures here, and go on with those that it has")
    return parser


if __name__ == "__main__":
    sys.exit(main())
