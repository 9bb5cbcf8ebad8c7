"""Compare the quality of models, or of ways to store one model.

    python tools/quality.py --reference llama:qwen2.5-coder-1.5b onnx:qwen2.5-coder-1.5b onnx:qwen2.5-coder-1.5b@int8
    python tools/quality.py ... --workload prompts.jsonl --limit 6 --problems HumanEval.jsonl.gz
    python tools/quality.py ... --problems HumanEval.jsonl.gz --programs-only --draft qwen2.5-coder-0.5b
    python tools/quality.py ... --baseline onnx:qwen2.5-coder-1.5b@int4-plain
    python tools/quality.py --reference native/f32:qwen2.5-coder-1.5b native:qwen2.5-coder-1.5b  # cache types

Perplexity on the text that comes with the package; agreement of the greedy token with the reference and divergence
from it over the reference's own answers to a workload's prompts (default: the sample prompts); with --problems, how
many programs of the model pass their tests, each run in a sandbox; with --baseline, what passes cost beside it. What
the reference said and what models wrote is kept in the cache folder, so that an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from edge_spec.benchmark.workload import choose, read_workload, sample_workload
from edge_spec.cores import check_threads
from edge_spec.errors import EdgeSpecError, UsageError
from edge_spec.quality.contender import Name
from edge_spec.quality.measure import Plan, add_times, measure
from edge_spec.quality.problems import read_problems
from edge_spec.quality.report import as_json, as_text
from edge_spec.store import Store

_NOTE_EVERY_S = 10.0
_KEPT_S = 0.05
"""What takes less was not computed, but read."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the comparison; 0 if it was made, 1 if something failed, 2 for bad usage."""
    options = _parser().parse_args(arguments)
    if options.programs_only and options.problems is None:
        print("quality: --programs-only needs --problems", file=sys.stderr)
        return 2
    try:
        reference, others = Name.parse(options.reference), [Name.parse(text) for text in options.models]
        baseline = Name.parse(options.baseline) if options.baseline else None
        prompts = read_workload(options.workload) if options.workload else sample_workload()
        plan = Plan(
            prompts=choose(prompts, tasks=options.tasks, limit=options.limit),
            answer_tokens=options.answer_tokens,
            problems=read_problems(options.problems)[: options.problem_limit] if options.problems else (),
            draft=options.draft,
            threads=check_threads(options.threads),
            likeness=not options.programs_only,
        )
        store = Store()
        rows = measure(plan, reference, others, store, _Notes())
        if baseline is not None:
            rows = add_times(rows, baseline, [reference, *others], store, plan.threads)
    except UsageError as exc:
        print(f"quality: {exc}", file=sys.stderr)
        return 2
    except EdgeSpecError as exc:
        print(f"quality: {exc}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    if options.json:
        run = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
        print(json.dumps(as_json(rows, {"run": run}), indent=1))
    else:
        print(as_text(rows))
    return 0


class _Notes:
    """Progress on standard error: a new stage at once, its counts and the time it still takes now and then."""

    def __init__(self) -> None:
        self._stage = ""
        self._last_s = self._called_s = 0.0
        self._start = (0.0, 0)

    def __call__(self, stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        if stage != self._stage or now - self._called_s < _KEPT_S:
            self._start = now, done  # what was kept by an earlier run takes no time and tells nothing
        new, self._stage, self._called_s = stage != self._stage, stage, now
        if not new and now - self._last_s < _NOTE_EVERY_S and done < total:
            return
        self._last_s = now
        (since, first), text = self._start, stage if total <= 1 else f"{stage} {done}/{total}"
        if done > first:
            each = (now - since) / (done - first)
            text += f", {each:.1f} s each, {each * (total - done) / 60:.0f} min to go"
        print(text, file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    summary, _, _ = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(prog="quality", description=summary)
    parser.add_argument("models", nargs="*", help="BACKEND:MODEL, BACKEND:MODEL@RECIPE or BACKEND/KV:MODEL")
    parser.add_argument("--reference", required=True, help="what they are compared with, named alike")
    parser.add_argument("--workload", type=Path, help="JSON lines with id, task and prompt; default: the samples")
    parser.add_argument("--tasks", type=lambda text: text.split(","), default=[], help="comma-separated; default all")
    parser.add_argument("--limit", type=_positive, help="at most so many prompts of each task")
    parser.add_argument("--answer-tokens", type=_positive, default=64, help="at most so many of each answer")
    parser.add_argument("--problems", type=Path, help="JSON lines (.gz) with task_id, prompt, entry_point and test")
    parser.add_argument("--problem-limit", type=_positive, help="at most so many of them")
    parser.add_argument("--programs-only", action="store_true", help="no texts: put the problems and nothing else")
    parser.add_argument("--draft", help="a model that drafts programs for those on onnx: the same text, sooner")
    parser.add_argument("--baseline", help="time passes, in turn with this one")
    parser.add_argument("--threads", type=_positive)
    parser.add_argument("--json", action="store_true", help="one object on standard output")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return value


if __name__ == "__main__":
    sys.exit(main())
