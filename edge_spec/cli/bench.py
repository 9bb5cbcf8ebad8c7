"""`edge-spec bench`: what speculation brings on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edge_spec.cli import options
from edge_spec.cli.bench_report import print_report
from edge_spec.cli.console import INTERRUPTED
from edge_spec.cli.options import BackendChoice, DrafterName
from edge_spec.cli.progress import ProgressDisplay
from edge_spec.cli.status import remark, remark_notes, setup
from edge_spec.errors import UsageError

_PAIRS = 10

if TYPE_CHECKING:
    from edge_spec.benchmark import Pair, Prompt
    from edge_spec.engine import Engine


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
    worst: Annotated[
        int | None, typer.Option(min=1, help="Then repeat so many of the worst prompts, to see what they are worth.")
    ] = None,
    repeats: Annotated[
        int | None, typer.Option("--pairs", min=1, help=f"Pairs of runs of each of them (default: {_PAIRS}).")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Write the ratios as a PNG to this file.")] = None,
    pair: options.PairOption = None,
    target: options.TargetOption = None,
    draft: options.DraftOption = None,
    backend: options.BackendOption = BackendChoice.AUTO,
    draft_backend: options.DraftBackendOption = None,
    recipe: options.RecipeOption = None,
    threads: options.ThreadsOption = None,
    ctx: options.CtxOption = None,
    ram: options.RamOption = None,
    drafter: options.DrafterOption = DrafterName.AUTO,
    draft_tokens: options.DraftTokensOption = None,
    no_pad: options.NoPadOption = False,
) -> None:
    """Answer the same prompts with and without drafts, in turn, and compare the speed."""
    from edge_spec.benchmark import choose, read_workload, sample_workload, summarise, worst_prompts

    if drafter is DrafterName.NONE:
        raise UsageError("--drafter none is what the others are compared with: choose one that drafts")
    if drafter is DrafterName.HISTORY:
        raise UsageError("--drafter history would copy the answers of the run before: it tells nothing")
    if repeats is not None and worst is None:
        raise UsageError("--pairs says how often the worst prompts are repeated: it needs --worst")
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
        no_pad=no_pad,
    )
    pairs: list[Pair] = []
    repeated: list[Pair] = []
    with engine:
        notes = list(engine.info.notes)
        interrupted = _measure(engine, prompts, pairs, notes, max_tokens=max_tokens, drafter=drafter.value)
        if worst is not None and not interrupted:
            again, times = worst_prompts(pairs, worst), repeats or _PAIRS
            interrupted = _repeat(engine, again, times, repeated, notes, max_tokens=max_tokens, drafter=drafter.value)
        info = engine.info
    if pairs:
        report = summarise(pairs, notes, repeated)
        print_report(report, info, as_json=as_json)
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


def _repeat(
    engine: Engine,
    prompts: list[Prompt],
    times: int,
    repeated: list[Pair],
    notes: list[str],
    *,
    max_tokens: int,
    drafter: str,
) -> bool:
    """Fill `repeated`; as `_measure` otherwise."""
    from edge_spec.benchmark import repeat

    total = times * len(prompts)
    try:
        for pair in repeat(engine, prompts, times, max_tokens=max_tokens, drafter=drafter):
            repeated.append(pair)
            remark(f"worst, {len(repeated)}/{total} {pair.prompt.id}: {_rates(pair)}")
    except KeyboardInterrupt:
        notes.append(f"stopped after {len(repeated)} of {total} pairs of the worst prompts")
        return True
    return False


def _rates(pair: Pair) -> str:
    plain, speculative = pair.plain.tokens_per_s, pair.speculative.tokens_per_s
    if plain is None or speculative is None:
        return "too short to tell a rate"
    return f"{plain:.1f} -> {speculative:.1f} tokens/s, {speculative / plain:.2f} x"
