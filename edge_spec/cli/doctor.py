"""`edge-spec doctor`: what this machine makes of a pair."""

from __future__ import annotations

import json
import sys
from enum import StrEnum
from time import perf_counter
from typing import TYPE_CHECKING, Annotated

import typer

from edge_spec.cli import options
from edge_spec.cli.options import BackendChoice
from edge_spec.cli.progress import ProgressDisplay
from edge_spec.cli.status import remark
from edge_spec.errors import UsageError

if TYPE_CHECKING:
    from edge_spec.doctor import Examination, ModelTimes
    from edge_spec.opening import LoadOptions
    from edge_spec.store import Store

_ACCEPTANCES = (0.5, 0.7, 0.8, 0.9, 0.95)


class Role(StrEnum):
    """A model of a pair."""

    TARGET = "target"
    DRAFT = "draft"


def doctor(
    *,
    compare: Annotated[
        bool, typer.Option("--compare", help="Compare the installed backends instead, in turn; --backend auto uses it.")
    ] = False,
    only: Annotated[Role | None, typer.Option(help="With --compare: this model alone.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of the tables.")] = False,
    pair: options.PairOption = None,
    target: options.TargetOption = None,
    draft: options.DraftOption = None,
    backend: options.BackendOption = BackendChoice.AUTO,
    draft_backend: options.DraftBackendOption = None,
    recipe: options.RecipeOption = None,
    threads: options.ThreadsOption = None,
) -> None:
    """Measure what passes cost on this machine, in half a minute; later engines start from it.

    Nothing has to be examined before a model is used: an engine learns the same from its own passes, only later.
    With --compare, which takes some minutes, each installed backend runs the pair in a process of its own.
    """
    started = perf_counter()
    from edge_spec.opening import LoadOptions, resolve
    from edge_spec.store import Store

    if only is not None and not compare:
        raise UsageError("--only is for --compare")
    if compare and (backend is not BackendChoice.AUTO or draft_backend is not None):
        raise UsageError("--compare takes every backend that is installed: drop --backend and --draft-backend")
    store, progress = Store(), ProgressDisplay()
    asked = LoadOptions(
        pair=pair,
        target=target,
        draft=draft,
        backend=backend.value,
        draft_backend=draft_backend.value if draft_backend else None,
        recipe=recipe,
        threads=threads,
    )
    if compare:
        _compare(asked, store, [only.value] if only else [role.value for role in Role], progress, as_json=as_json)
        return
    from edge_spec.doctor import examine

    with progress:
        found = examine(
            resolve(asked, store, progress.stage), store, choose_threads=threads is None, progress=progress.stage
        )
    if as_json:
        about = {"machine": _machine(), "versions": _versions(found)}
        took = {"took_s": round(perf_counter() - started, 1)}
        print(json.dumps(about | found.to_json() | took, allow_nan=False), flush=True)
        return
    _print_tables(found)
    remark(f"{_machine()} · {' · '.join(_versions(found))} · examined in {perf_counter() - started:.1f} s")


def _compare(asked: LoadOptions, store: Store, roles: list[str], progress: ProgressDisplay, *, as_json: bool) -> None:
    from edge_spec.cli.comparison_table import print_comparison
    from edge_spec.doctor import compare

    with progress:
        found = compare(asked, store, roles=roles, progress=progress.stage)
    if as_json:
        print(json.dumps({"machine": _machine()} | found.to_json(), allow_nan=False), flush=True)
    else:
        print_comparison(found)


def _machine() -> str:
    from edge_spec.processor import processor_name

    return processor_name()


def _versions(found: Examination) -> list[str]:
    from edge_spec.loading import engine_key

    return sorted({engine_key(model.backend) for model in (found.target, found.draft) if model})


def _print_tables(found: Examination) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(file=sys.stdout, highlight=False, width=None if sys.stdout.isatty() else 110)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("model", "cached"):
        table.add_column(name, justify="left" if name == "model" else "right")
    shown = [rows for rows in (1, 2, 3, 4, 6, 8, 12, 16, 32) if found.target.seconds(rows)]
    for rows in shown:
        table.add_column(f"{rows}", justify="right")
    for model in filter(None, (found.target, found.draft)):
        for cached in sorted({p.cached for p in model.passes}):
            cells = [_ms(model, rows, cached) for rows in shown]
            table.add_row(model.name, str(cached), *cells)
    console.print("milliseconds of a pass by its number of tokens")
    console.print(table)
    gib = found.read_bandwidth_bytes_per_s / 1e9
    console.print(f"memory is read at {gib:.1f} GB/s by {_threads(found.threads)}", soft_wrap=True)
    for model in filter(None, (found.target, found.draft)):
        console.print(f"{model.name} reads {model.reading_tokens_per_s:.0f} tokens/s ({_rows(model)})", soft_wrap=True)
    _print_worth(found, console.print)
    if len(found.thread_times) > 1:
        tried = ", ".join(f"{n}: {1e3 * seconds:.0f} ms" for n, seconds in found.thread_times.items())
        console.print(f"threads: {found.threads} from now on (passes of 1 and 4 tokens: {tried})", soft_wrap=True)


def _print_worth(found: Examination, say: object) -> None:
    assert callable(say)
    plain = 1 / found.costs.target_s(1)
    say(f"plain decoding: {plain:.1f} tokens/s")
    if found.draft is None:
        return
    worth = []
    for acceptance in _ACCEPTANCES:
        rate, length = found.costs.best_fixed(acceptance, 7)
        worth.append(f"{acceptance:.0%} accepted: {rate:.1f} tokens/s, {rate / plain:.2f} x ({length} drafted)")
    for line in ["with the draft model, by how often its tokens are", *worth]:
        say(line)


def _ms(model: ModelTimes, rows: int, cached: int) -> str:
    seconds = model.seconds(rows, cached)
    return "-" if seconds is None else f"{1e3 * seconds:.1f}"


def _rows(model: ModelTimes) -> str:
    if model.row_alignment is None:
        return f"{model.recipe} on {model.backend}, rows as they come"
    return f"{model.recipe} on {model.backend}, rows padded to multiples of {model.row_alignment}"


def _threads(count: int) -> str:
    return f"{count} thread{'' if count == 1 else 's'}"
