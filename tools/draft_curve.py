"""The curve of a draft: what its token costs, how often the target agrees with it, and what that is worth.

    python tools/draft_curve.py --workload FILE --limit 4 --answers answers.jsonl --exports DIR
    python tools/draft_curve.py --answers answers.jsonl --exports DIR --points plain,draft,whole,32k,8k --rounds 60

Each point is a recipe, or the name of an export that is in the folder already. The first is the straightforward export
(whole head, round to nearest), drafted from whole rows of logits; the others draft as generations do. Costs are
measured in turn in one run; acceptance is the share of positions of the target's own answers where the draft's
likeliest token is the target's. The last column replays the answers through the planner with the costs of this run,
scaled so that the straightforward token costs --plain-ms: how many times faster than the target's plain decoding (and
the worst answer). With --row-costs it is a column for each of them: what each further row adds to a pass, in passes of
one row, of either model; nothing is padded then.
Answers are recorded by the target if the file is not there, exports are made if they are not, and guesses are kept
beside them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from math import inf
from pathlib import Path

import numpy as np
from draft_bench import answers as recorded
from draft_bench.answers import Answer
from draft_bench.measure import CACHED, drafting, guess, straightforward, time_in_turn
from draft_bench.replay import TARGET, Passes, geometric_mean, replay

from edge_spec.backends.onnx import OnnxModel
from edge_spec.benchmark.workload import choose, read_workload, sample_workload
from edge_spec.cores import check_threads
from edge_spec.errors import EdgeSpecError, UsageError
from edge_spec.export import RECIPES, Recipe, export_model, open_export
from edge_spec.export.folder import is_export
from edge_spec.loading import find_source
from edge_spec.store import Store

POINTS = {
    recipe.name: recipe
    for recipe in (
        Recipe("plain", 4, 128),
        RECIPES["draft"],
        Recipe("whole", 4, 128, zero_points=True),
        *(Recipe(f"{n}k", 4, 128, zero_points=True, head_rows=n << 10) for n in (65, 32, 24, 16, 8)),
        Recipe("symmetric", 4, 128, head_rows=32 << 10),
        *(Recipe(f"block-{n}", 4, n, zero_points=True, head_rows=32 << 10) for n in (32, 64, 256)),
    )
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the curve; 0 if it was made, 1 if something failed, 2 for bad usage."""
    options = _parser().parse_args(arguments)
    try:
        names = options.points.split(",")
        threads = check_threads(options.threads)
        for folder in (options.exports, options.answers.parent):
            folder.mkdir(parents=True, exist_ok=True)
        if not options.answers.exists():
            prompts = read_workload(options.workload) if options.workload else sample_workload()
            prompts = choose(prompts, limit=options.limit)
            recorded.record(options.target, prompts, options.answer_tokens, threads, options.answers)
        print_curve(names, recorded.read(options.answers), options, threads)
    except UsageError as exc:
        print(f"draft_curve: {exc}", file=sys.stderr)
        return 2
    except EdgeSpecError as exc:
        print(f"draft_curve: {exc}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def print_curve(names: Sequence[str], answers: list[Answer], options: argparse.Namespace, threads: int) -> None:
    """Measure the points and print them as a table in Markdown."""
    models = [_open(name, options, threads) for name in names]
    guesses = [
        _guesses(model, options.exports / f"{name}.guesses.json", answers)
        for name, model in zip(names, models, strict=True)
    ]
    longest = max(answers, key=lambda answer: len(answer.prompt))
    context = (longest.prompt * CACHED)[:CACHED]
    for model in models:
        model.reach(longest.prompt + longest.ids, anew=True)
    ways = [(straightforward if i == 0 else drafting)(model, context) for i, model in enumerate(models)]
    taken = time_in_turn(ways, options.rounds)
    target = np.concatenate([answer.ids for answer in answers])
    costs = options.row_costs or (None,)
    faster = "".join(f" times plain decoding{'' if cost is None else f', {cost} a row'} |" for cost in costs)
    print(f"| point | ms, median (least) | of plain | acceptance | of plain |{faster}")
    print("|---|---|---|---|---|" + "---|" * len(costs))
    base = 0.0
    for i, name in enumerate(names):
        ratio = float(np.median(taken[:, i] / taken[:, 0]))
        accepted = float(np.mean([token for known in guesses[i] for token, _ in known] == target))
        base = base or accepted
        kept = f"{accepted / base:.3f}" if base else "-"
        draft_ms = options.plain_ms * ratio
        replayed = [replay(answers, guesses[i], *_passes(draft_ms, cost)) for cost in costs]
        times = " | ".join(f"{geometric_mean(ratios):.3f} ({min(ratios):.2f})" for ratios in replayed)
        print(
            f"| {name} | {np.median(taken[:, i]):.2f} ({taken[:, i].min():.2f}) | {ratio:.3f} | {accepted:.4f} "
            f"| {kept} | {times} |",
            flush=True,
        )


def _passes(draft_ms: float, row_cost: float | None) -> tuple[Passes, Passes]:
    """The draft's and the target's."""
    if row_cost is None:
        return Passes.of_draft(draft_ms), TARGET
    return Passes.of_row_cost(draft_ms, row_cost), Passes.of_row_cost(TARGET.ms[1], row_cost)


def _open(name: str, options: argparse.Namespace, threads: int) -> OnnxModel:
    path: Path = options.exports / name
    if not is_export(path):
        if name not in POINTS:
            raise UsageError(f"{name} is no export in {options.exports} and no point; there are {', '.join(POINTS)}")
        source = find_source(Store(), options.draft)
        export_model(source.gguf, POINTS[name], path, sha256=source.sha256, threads=threads)
    export = open_export(path)
    if export.recipe != POINTS.get(name, export.recipe):
        raise UsageError(f"{path} was made by another recipe than {name}'s of today: remove it")
    return OnnxModel(export, name=name, n_ctx=4096, threads=threads)


def _guesses(model: OnnxModel, file: Path, answers: list[Answer]) -> list[list[tuple[int, float]]]:
    """What the draft guesses, from `file` if it holds the guesses at these answers."""
    key = hashlib.sha256(repr(answers).encode()).hexdigest()
    try:
        kept = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError):
        kept = {}
    if kept.get("answers") != key:
        kept = {"answers": key, "guesses": [guess(model, answer) for answer in answers]}
        file.write_text(json.dumps(kept), "utf-8")
    return [[(int(token), float(p)) for token, p in known] for known in kept["guesses"]]


def _row_costs(text: str) -> tuple[float, ...]:
    costs = tuple(float(cost) for cost in text.split(","))
    if not all(0 < cost < inf for cost in costs):
        raise ValueError
    return costs


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n", 1)[0])
    parser.add_argument("--answers", type=Path, required=True, help="the target's answers; recorded if not there")
    parser.add_argument("--exports", type=Path, required=True, help="folder of the points' exports; made if not there")
    parser.add_argument("--points", default=",".join(POINTS), help="which, the straightforward one first")
    parser.add_argument("--workload", type=Path, help="prompts to record answers to (default: the sample prompts)")
    parser.add_argument("--limit", type=int, help="prompts of each task")
    parser.add_argument("--answer-tokens", type=int, default=128)
    parser.add_argument("--target", default="qwen2.5-coder-1.5b")
    parser.add_argument("--draft", default="qwen2.5-coder-0.5b")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--rounds", type=int, default=60, help="of timing all points in turn")
    parser.add_argument("--row-costs", type=_row_costs, default=(), help="in passes of one row, as 0.1,0.4")
    parser.add_argument("--plain-ms", type=float, default=12.0, help="a straightforward draft token, for the replay")
    return parser


if __name__ == "__main__":
    sys.exit(main())
