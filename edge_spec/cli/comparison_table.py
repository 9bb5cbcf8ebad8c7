"""What `edge-spec doctor --compare` prints."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from edge_spec.cli.status import remark

if TYPE_CHECKING:
    from rich.table import Table

    from edge_spec.doctor import Comparison, ModelComparison

_MIB = 1 << 20


def print_comparison(found: Comparison) -> None:
    """Each model's table on standard output; what was chosen, and what is missing, beside it."""
    from rich.console import Console

    console = Console(file=sys.stdout, highlight=False, width=None if sys.stdout.isatty() else 110)
    for role, model in found.models.items():
        threads = f"{model.threads} thread{'' if model.threads == 1 else 's'}"
        console.print(
            f"{role} {model.name}, {threads}: milliseconds of a pass behind {model.cached} tokens by its rows, "
            f"medians of {model.rounds} rounds; x: over {model.figures[0].backend}",
            soft_wrap=True,
        )
        console.print(_table(model))
        for backend, reason in model.failed.items():
            remark(f"{backend} is left out: {reason}")
    if (choice := found.choice) is not None:
        beside = f", the draft on {choice.draft_backend}" if choice.has_draft else ""
        console.print(f"--backend auto takes {choice.backend}{beside} from now on", soft_wrap=True)
    engines = sorted({one.engine for model in found.models.values() for one in model.figures})
    remark(f"{' · '.join(engines)} · compared in {found.took_s:.0f} s")


def _table(model: ModelComparison) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("rows")
    first, *others = model.figures
    table.add_column(first.backend, justify="right")
    for one in others:
        table.add_column(one.backend, justify="right")
        table.add_column("x", justify="right")
    for rows in first.pass_s:
        _add(table, str(rows), [f"{1e3 * one.pass_s[rows]:.1f}" for one in model.figures])
    _add(table, f"reading {model.read}, tokens/s", [f"{one.read_tokens_per_s:.0f}" for one in model.figures])
    _add(table, "loading, s", [f"{one.load_s:.1f}" for one in model.figures])
    _add(table, "anonymous, MiB", [f"{one.anonymous_bytes / _MIB:.0f}" for one in model.figures])
    _add(table, "mapped, MiB", [f"{one.mapped_bytes / _MIB:.0f}" for one in model.figures])
    _add(table, "both, MiB", [f"{(one.anonymous_bytes + one.mapped_bytes) / _MIB:.0f}" for one in model.figures])
    _add(table, "rows padded to", [str(one.row_alignment or "-") for one in model.figures], ratios=False)
    _add(table, "weights", [one.recipe for one in model.figures], ratios=False)
    return table


def _add(table: Table, label: str, figures: list[str], *, ratios: bool = True) -> None:
    first, *others = figures
    cells = [first]
    for figure in others:
        cells += [figure, _ratio(figure, first) if ratios else ""]
    table.add_row(label, *cells)


def _ratio(figure: str, first: str) -> str:
    return f"{float(figure) / float(first):.2f}" if float(first) else "-"
