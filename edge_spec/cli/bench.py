"""`edge-spec bench`: what speculation brings on this machine."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edge_spec.cli import options
from edge_spec.cli.console import INTERRUPTED
from edge_spec.cli.options import BackendChoice, DrafterName
from edge_spec.cli.progress import ProgressDisplay
from edge_spec.cli.status import drafter_line, remark, remark_notes, setup
from edge_spec.errors import UsageError

if TYPE_CHECKING:
    from edge_spec.benchmark import Pair, Prompt, Report
    from edge_spec.engine import Engine
    from edge_spec.generation import EngineInfo

_TABLE_WIDTH = 100


def bench(
    *,
    workload: Annotated[
        Path | None,
        typer.Option(help="Prompts, one JSON object a line: id, task, prompt (default: some that come with this)."),
    ] = None,
    tasks: Annotated[str | None, typer.Option(help="Only these tasks, as a,b,c.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Prompts of each task at most.")] = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", "-n", min=2, help="Most tokens of an answer.")] = 128,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of the table.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Write the ratios as a PNG to this file.")] = None,
    pair: options.PairOption = None,
    target: options.TargetOption = None,
    draft: options.DraftOption = None,
    backend: options.BackendOption = BackendChoice.ONNX,
    draft_backend: options.DraftBackendOption = None,
    recipe: options.RecipeOption = None,
    threads: options.ThreadsOption = None,
    ctx: options.CtxOption = None,
    ram: options.RamOption = None,
    drafter: options.DrafterOption = DrafterName.AUTO,
    draft_tokens: options.DraftTokensOption = None,
) -> None:
    """Answer the same prompts with and without drafts, in turn, and compare the speed."""
    from edge_spec.benchmark import choose, read_workload, sample_workload, summarise

    if drafter is DrafterName.NONE:
        raise UsageError("--drafter none is what the others are compared with: choose one that drafts")
    if drafter is DrafterName.HISTORY:
        raise UsageError("--drafter history would copy the answers of the run before: it tells nothing")
    if plot is not None:
        from edge_spec.benchmark.plot import require_plotting

        require_plotting(plot)
    prompts = choose(
        read_workload(workload) if workload is not None else sample_workload(), tasks=_names(tasks), limit=limit
    )
    if drafter is DrafterName.REFERENCE and (bare := [prompt.id for prompt in prompts if not prompt.reference]):
        raise UsageError(f"--drafter reference needs prompts with a reference: {bare[0]} has none")
    engine = options.load_engine(
        ProgressDisplay(),
        pair=pair,
        target=target,
        draft=draft,
        backend=backend,
        draft_backend=draft_backend,
        drafter=drafter,
        draft_tokens=draft_tokens,
        recipe=recipe,
        threads=threads,
        ctx=ctx,
        ram=ram,
        no_pad=False,
    )
    pairs: list[Pair] = []
    with engine:
        notes = list(engine.info.notes)
        interrupted = _measure(engine, prompts, pairs, notes, max_tokens=max_tokens, drafter=drafter.value)
        info = engine.info
    if pairs:
        report = summarise(pairs, notes)
        _print_report(report, info, as_json=as_json)
        if plot is not None:
            from edge_spec.benchmark.plot import write_plot

            write_plot(report, setup(info), plot)
    else:
        remark_notes(notes)
    if interrupted or not pairs:
        raise typer.Exit(INTERRUPTED if interrupted else 1)


def _names(tasks: str | None) -> list[str]:
    names = [name.strip() for name in tasks.split(",")] if tasks is not None else []
    if not all(names):
        raise UsageError("--tasks takes names with commas between them")
    return names


def _measure(
    engine: Engine, prompts: list[Prompt], pairs: list[Pair], notes: list[str], *, max_tokens: int, drafter: str
) -> bool:
    """Fill `pairs`, with a line on standard error for each; what was left out goes to `notes`.

    Returns whether Ctrl-C ended it; what was measured until then counts.
    """
    from edge_spec.benchmark import compare

    def skip(prompt: Prompt, why: Exception) -> None:
        notes.append(f"{prompt.id} was left out: {why}")

    measured: Iterator[Pair] = compare(engine, prompts, max_tokens=max_tokens, drafter=drafter, on_skip=skip)
    try:
        for pair in measured:
            pairs.append(pair)
            done = prompts.index(pair.prompt) + 1
            remark(f"{done}/{len(prompts)} {pair.prompt.id}: {_rates(pair)}")
    except KeyboardInterrupt:
        notes.append(f"stopped after {len(pairs)} of {len(prompts)} prompts")
        return True
    return False


def _rates(pair: Pair) -> str:
    plain, speculative = pair.plain.tokens_per_s, pair.speculative.tokens_per_s
    if plain is None or speculative is None:
        return "too short to tell a rate"
    return f"{plain:.1f} -> {speculative:.1f} tokens/s, {speculative / plain:.2f} x"


def _print_report(report: Report, info: EngineInfo, *, as_json: bool) -> None:
    from edge_spec.loading import processor_name

    if as_json:
        names = ("target", "draft", "backend", "draft_backend", "recipe", "threads")
        about = {name: getattr(info, name) for name in names}
        print(json.dumps({"machine": processor_name(), **about, **report.to_json()}, allow_nan=False), flush=True)
        return
    _print_table(report)
    remark(f"{processor_name()} · {setup(info)}")
    prompts = sum(figures.prompts for figures in report.tasks.values())
    remark(f"the same answer both ways: {report.same_answers} of {prompts} (plain passes are not padded)")
    if report.own_share is not None:
        remark(f"drafters, planner and bookkeeping: {report.own_share:.1%} of decode time")
    remark_notes(report.notes)


def _print_table(report: Report) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("task")
    for name in ("prompts", "plain t/s", "spec. t/s", "ratio", "worst", "tok/step", "accepted", "ttft s", "ttft ratio"):
        table.add_column(name, justify="right")
    for task, figures in report.tasks.items():
        table.add_row(
            task,
            str(figures.prompts),
            _shown(figures.plain_tokens_per_s, ".1f"),
            _shown(figures.speculative_tokens_per_s, ".1f"),
            _shown(figures.ratio, ".2f"),
            _shown(figures.worst_ratio, ".2f"),
            _shown(figures.tokens_per_step, ".2f"),
            _shown(figures.acceptance_rate, ".0%"),
            _shown(figures.ttft_s, ".2f"),
            _shown(figures.ttft_ratio, ".2f"),
        )
    total = str(sum(figures.prompts for figures in report.tasks.values()))
    mean, worst = _shown(report.geomean_ratio, ".2f"), _shown(report.worst_ratio, ".2f")
    table.add_row("geometric mean", total, "", "", mean, worst, style="bold")
    console = Console(file=sys.stdout, highlight=False, width=None if sys.stdout.isatty() else _TABLE_WIDTH)
    console.print(table)
    for task, figures in report.tasks.items():
        for name, stats in figures.drafters.items():
            console.print(f"{task}: {drafter_line(name, stats)}", markup=False, soft_wrap=True)
    if report.worst_prompt is not None:
        console.print(f"worst prompt: {report.worst_prompt}, {worst} x", markup=False, soft_wrap=True)


def _shown(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
