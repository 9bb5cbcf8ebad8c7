"""`edge-spec export`: a GGUF as a folder that the onnx and openvino backends run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edge_spec.cli.console import byte_progress, print_note
from edge_spec.errors import StorageError, UsageError
from edge_spec.sizes import format_size

if TYPE_CHECKING:
    from edge_spec.export.recipe import Recipe
    from edge_spec.store import Store

QUALITY = "quality.json"
"""Where the figures of `--report` are kept, in the export's folder."""


def export(
    *,
    source: Annotated[str, typer.Argument(help="A model's name, a pulled hub reference, or a GGUF file.")],
    to: Annotated[
        Path | None, typer.Option(help="The new folder; it stands alone. Default: the store, as the first run does.")
    ] = None,
    draft_of: Annotated[
        str | None,
        typer.Option(help="The target that this will draft for: 4 bits and a trimmed output head (recipe draft)."),
    ] = None,
    recipe: Annotated[str | None, typer.Option(help="int4, int8 or exact. Default: follows the source.")] = None,
    bits: Annotated[int | None, typer.Option(help="4 or 8 bits a weight, for a recipe of your own.")] = None,
    block: Annotated[int | None, typer.Option(help="Weights that share a scale, for a recipe of your own.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Default: all cores.")] = None,
    report: Annotated[
        bool,
        typer.Option(
            "--report", help="Compare the export with its source, on a text and on answers: a table, and quality.json."
        ),
    ] = False,
) -> None:
    """Export a model to ONNX with 4- or 8-bit weights. The folder's path goes to standard output."""
    from edge_spec.export.exporter import ensure_export, export_model
    from edge_spec.store import Store

    store = Store()
    model = store.resolve(source)
    if draft_of is not None:
        if recipe is not None or bits is not None or block is not None:
            raise UsageError("--draft-of decides the recipe: drop --recipe, --bits and --block")
        if report:
            raise UsageError("--report compares whole vocabularies, and a draft leaves tokens out: drop it")
        recipe = "draft"
        _check_vocabulary(store, source, draft_of)
    chosen = _choose(model.path, recipe, bits, block)
    with byte_progress(f"export {model.name} as {chosen.name}") as (progress, _):
        if to is None:
            made = ensure_export(
                model.path, model.sha256, chosen, store.exports_dir, threads=threads, progress=progress
            )
        else:
            made = export_model(
                model.path, chosen, to.expanduser(), sha256=model.sha256, threads=threads, progress=progress
            )
    if made.requantized:
        print_note(f"no exact form for {', '.join(made.requantized)} tensors: stored with {chosen.bits} bits")
    print_note(f"{format_size(made.weight_bytes)} of weights")
    if report:
        _report(store, model.path, made.path, threads)
    print(made.path)


def _report(store: Store, source: Path, export: Path, threads: int | None) -> None:
    """How the export compares with its source: a table on standard error, and quality.json beside the weights."""
    from edge_spec.benchmark.workload import sample_workload
    from edge_spec.cli.progress import ProgressDisplay
    from edge_spec.cores import check_threads
    from edge_spec.quality.contender import Name
    from edge_spec.quality.measure import Plan, measure, reference_for
    from edge_spec.quality.report import as_json, as_text

    plan = Plan(prompts=sample_workload(), threads=check_threads(threads))
    reference = reference_for(source)
    print_note(f"compared with {reference}")
    with ProgressDisplay() as display:
        rows = measure(plan, reference, [Name("onnx", str(export))], store, display.stage)
    print_note(as_text(rows))
    written = json.dumps(as_json(rows, {"reference": str(reference)}), indent=2)
    try:
        (export / QUALITY).write_text(written + "\n", "utf-8")
    except OSError as exc:
        raise StorageError(f"{export / QUALITY} cannot be written: {exc}") from exc


def _check_vocabulary(store: Store, draft: str, target: str) -> None:
    """Ids of the draft have to mean the same to the target; VocabMismatchError else."""
    from edge_spec.loading import find_source
    from edge_spec.tokenizer import check_same_vocabulary

    check_same_vocabulary(find_source(store, target).tokenizer, find_source(store, draft).tokenizer)


def _choose(path: Path, name: str | None, bits: int | None, block: int | None) -> Recipe:
    from edge_spec.export.recipe import RECIPES, Recipe, default_recipe, find_recipe
    from edge_spec.formats.gguf import GGUFFile

    own = bits is not None or block is not None
    if name is not None:
        if own:
            raise UsageError("--recipe decides bits and block: give --recipe, or --bits and --block")
        return find_recipe(name)
    with GGUFFile(path) as gguf:
        default = default_recipe(gguf)
    if not own:
        return default
    bits, block = bits or default.bits, block or default.block
    known = (recipe for recipe in RECIPES.values() if (recipe.bits, recipe.block, recipe.exact) == (bits, block, False))
    return next(known, Recipe(f"int{bits}-block{block}", bits=bits, block=block, zero_points=bits == 4))
