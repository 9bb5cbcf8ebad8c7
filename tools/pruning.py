"""What is lost and what is won when a context is pruned: one report for a target and its draft.

    python tools/pruning.py --pair qwen2.5-coder --json report.json

Needles at ten depths of a long text, recall of facts told over ten turns, questions of code and sums in long texts, and
perplexity behind a text; each for the policies at keep ratios 0.75, 0.5 and 0.25, with the seconds to the first token
and the memory of the cache that was not needed. And twenty turns at a quarter of the window, against reading the pruned
context every turn. The texts are made up (`pruning_report/texts.py`) or this project's own pages. Greedy, drafts off,
from empty caches; two cores take some ten minutes.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from pruning_report import chat
from pruning_report.policies import Outcome, answer, perplexity, recall
from pruning_report.texts import Question, fact, needle, problem

from edge_spec import Engine

RATIOS = (0.75, 0.5, 0.25)
SECTIONS = ("needle", "problems", "recall", "perplexity", "chat")
_PAGE = Path(__file__).parents[1] / "docs" / "design.md"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the sections that were asked for; prints a table a section as soon as it is done."""
    options = _parser().parse_args(arguments)
    report: dict[str, object] = {}
    with Engine.load(
        options.pair, target=options.target, draft=options.draft, n_ctx=2048, threads=options.threads
    ) as engine:
        engine.generate("Say hello.", max_tokens=2, drafter="none")
        for section in options.sections.split(","):
            report[section] = _run(section, engine, options)
            if options.json:
                options.json.write_text(json.dumps(report, indent=1) + "\n", "utf-8")
    return 0


def _run(section: str, engine: Engine, options: argparse.Namespace) -> object:
    size, count = options.sentences, options.limit
    if section == "needle":
        return _prompts(engine, section, [needle(depth, size) for depth in range(10)][:count])
    if section == "problems":
        return _prompts(engine, section, [problem(number, size) for number in range(6)][:count])
    if section == "recall":
        return _table(section, lambda policy, keep: _recall(engine, policy, keep, count), ("turns", "sinks"))
    if section == "perplexity":
        text = _PAGE.read_text("utf-8")[: 60 * size * 2]
        return _table(
            section,
            lambda policy, keep: {"perplexity": perplexity(engine, policy, keep, text, scored=options.scored)},
            ("surprisal", "sinks"),
        )
    figures = chat.measure(engine, window=options.window, padding=1)
    print(section, json.dumps(figures), flush=True)
    return figures


def _prompts(engine: Engine, section: str, prompts: list[tuple[str, Question]]) -> object:
    per_token = engine._target.spec.kv_bytes_per_token

    def run(policy: str, keep: float) -> dict[str, float]:
        outcome = Outcome()
        for prompt, question in prompts:
            right, ttft_s, dropped = answer(engine, policy, keep, prompt, question)
            outcome.add(right=right, ttft_s=ttft_s, dropped=dropped)
        return {
            "right": outcome.right,
            "of": outcome.asked,
            "ttft_s": outcome.ttft_s,
            "saved_mib": outcome.dropped_tokens * per_token / 2**20,
        }

    return _table(section, run, ("surprisal", "sinks"))


def _recall(engine: Engine, policy: str, keep: float, count: int) -> dict[str, float]:
    outcomes = recall(engine, policy, keep, [fact(number) for number in range(10)])[:count]
    per_token = engine._target.spec.kv_bytes_per_token
    return {
        "right": sum(right for right, _ in outcomes),
        "of": len(outcomes),
        "saved_mib": sum(gone for _, gone in outcomes) / len(outcomes) * per_token / 2**20,
    }


def _table(
    section: str, run: Callable[[str, float], dict[str, float]], policies: Sequence[str]
) -> dict[str, dict[str, float]]:
    """One row for the whole context, then one a policy and ratio; printed as they come."""
    rows = {}
    for policy, keep in [("full", 1.0), *((policy, keep) for policy in policies for keep in RATIOS)]:
        rows[f"{policy} {keep}"] = run(policy, keep)
        figures = " · ".join(f"{name} {value:.4g}" for name, value in rows[f"{policy} {keep}"].items())
        print(f"{section} | {policy} | {keep} | {figures}", flush=True)
    return rows


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="What pruning a context costs and saves.")
    parser.add_argument("--pair", help="a pair by name (default: the default pair)")
    parser.add_argument("--target")
    parser.add_argument("--draft")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--sections", default=",".join(SECTIONS))
    parser.add_argument("--sentences", type=int, default=16, help="length of the long texts")
    parser.add_argument("--limit", type=int, default=10, help="most questions a section")
    parser.add_argument("--scored", type=int, default=97, help="tokens whose perplexity is taken")
    parser.add_argument("--window", type=int, default=320, help="window of the chat of twenty turns")
    parser.add_argument("--json", type=Path, help="write the figures here")
    return parser


if __name__ == "__main__":
    sys.exit(main())
