"""What `edge-spec bench` prints."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

from edge_spec.cli.status import drafter_line, remark, remark_notes, setup

if TYPE_CHECKING:
    from rich.console import Console

    from edge_spec.benchmark import RepeatedRatio, Repeats, Report
    from edge_spec.generation import EngineInfo

_TABLE_WIDTH = 100


def print_report(report: Report, info: EngineInfo, *, as_json: bool) -> None:
    """The table and its remarks, or one JSON object."""
    from edge_spec.processor import processor_name

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
    if report.repeats is not None:
        _print_repeats(console, report.repeats)


def _print_repeats(console: Console, repeats: Repeats) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("worst prompts, repeated")
    for name in ("pairs", "median ratio", "interval of the median"):
        table.add_column(name, justify="right")

    def add(name: str, ratio: RepeatedRatio, style: str | None = None) -> None:
        low, high = ratio.interval
        interval = f"{low:.3f} to {high:.3f} ({ratio.coverage:.1%})"
        table.add_row(name, str(ratio.pairs), f"{ratio.median_ratio:.3f}", interval, style=style)

    for name, ratio in repeats.prompts.items():
        add(name, ratio)
    add("all of them", repeats.overall, "bold")
    console.print()
    console.print(table)


def _shown(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
