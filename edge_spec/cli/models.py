"""`edge-spec models`: what is known and what is here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated

import typer

from edge_spec.cli.console import print_json
from edge_spec.sizes import format_size
from edge_spec.store import ModelStatus, Store


def models(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """List the models and pairs: which are here, how large they and their exports are, and their licences."""
    store = Store()
    statuses, others = store.models(), store.other_exports_bytes()
    if as_json:
        print_json(
            {
                "models": [asdict(s) | {"path": s.path and str(s.path)} for s in statuses],
                "pairs": [{"name": p.name, "target": p.target, "draft": p.draft} for p in store.pairs()],
                "other_exports_bytes": others,
            }
        )
        return
    _print_table([_HEADER, *map(_row, statuses)])
    for pair in store.pairs():
        print(f"pair {pair.name}: target {pair.target}, draft {pair.draft}")
    if others:
        print(f"exports of other files: {format_size(others)} in {store.exports_dir}")


_HEADER = ("NAME", "HERE", "SIZE", "EXPORTS", "LICENCE")


def _row(status: ModelStatus) -> tuple[str, ...]:
    here = "yes" if status.present else f"{format_size(status.partial_bytes)} of it" if status.partial_bytes else "no"
    exports = format_size(status.exports_bytes) if status.exports_bytes else "-"
    return status.name, here, format_size(status.size_bytes), exports, status.licence or "unknown"


def _print_table(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
