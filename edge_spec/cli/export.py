"""`edge-spec export`: a model as a folder that the onnx and openvino backends run, or as a GGUF of another type."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edge_spec.cli.console import byte_progress, print_note
from edge_spec.cli.quality import report_quality
from edge_spec.errors import UsageError
from edge_spec.sizes import format_size

if TYPE_CHECKING:
    from edge_spec.checkpoint.exporter import GraphExport
    from edge_spec.export.finished import Export
    from edge_spec.export.recipe import Recipe
    from edge_spec.store import LocalModel, Store

FORMATS = ("onnx", "gguf")


def export(
    *,
    source: Annotated[
        str, typer.Argument(help="A model's name, a pulled hub reference, a GGUF file, or a checkpoint's folder.")
    ],
    to: Annotated[
        str | None,
        typer.Option(help="The new folder (or .gguf file); it stands alone. Default: the store."),
    ] = None,
    format_: Annotated[str, typer.Option("--format", help="onnx or gguf.")] = "onnx",
    draft_of: Annotated[
        str | None,
        typer.Option(help="The target that this will draft for: 4 bits, and in ONNX a trimmed output head."),
    ] = None,
    recipe: Annotated[
        str | None, typer.Option(help="int4, int4-accurate, int4-fast, int8 or exact. Default: follows the source.")
    ] = None,
    bits: Annotated[int | None, typer.Option(help="4 or 8 bits a weight, for a recipe of your own.")] = None,
    block: Annotated[int | None, typer.Option(help="Weights that share a scale, for a recipe of your own.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Default: all cores.")] = None,
    type_: Annotated[
        str | None, typer.Option("--type", help="GGUF: Q4_0 (the default), Q4_K_M, Q8_0, ... Implies --format gguf.")
    ] = None,
    pure: Annotated[bool, typer.Option(help="GGUF: every matrix of this type, the output head too.")] = False,
    name: Annotated[str | None, typer.Option(help="GGUF: what the store calls it. Default: SOURCE-TYPE.")] = None,
    optimum_python: Annotated[
        Path | None,
        typer.Option(
            help="Checkpoint: go by way of optimum, in that Python. Default: only where our own exporter cannot, in "
            "this Python, else in an environment made once."
        ),
    ] = None,
    report: Annotated[
        bool,
        typer.Option("--report", help="Compare it with its source, on texts: a table, and quality.json in the folder."),
    ] = False,
) -> None:
    """Export a model: to ONNX with 4- or 8-bit weights, or to a GGUF of another type (`--to gguf --type Q4_0`).

    The path of what was made goes to standard output.
    """
    from edge_spec.checkpoint import is_checkpoint
    from edge_spec.store import Store

    if to == "gguf":
        format_, to = "gguf", None
    if format_ not in FORMATS:
        raise UsageError(f"--format {format_}: choose one of {', '.join(FORMATS)}")
    as_gguf = format_ == "gguf" or type_ is not None
    _refuse(as_gguf, {"--recipe": recipe, "--bits": bits, "--block": block}, "is for ONNX: a GGUF has a --type")
    _refuse(not as_gguf, {"--pure": pure or None, "--name": name}, "is for --format gguf")
    if draft_of is not None and (recipe is not None or bits is not None or block is not None):
        raise UsageError("--draft-of decides the recipe: drop --recipe, --bits and --block")

    _refuse(as_gguf or draft_of is not None, {"--report": report or None}, "is for an ONNX target with its whole head")
    store = Store()
    folder = Path(source).expanduser()
    recipe = "draft" if draft_of is not None else recipe
    if is_checkpoint(folder):
        if as_gguf:
            raise UsageError(
                "--format gguf takes a GGUF: make one of the checkpoint with llama.cpp's convert_hf_to_gguf.py, "
                "then requantise that"
            )
        _refuse(True, {"--report": report or None}, "takes a GGUF, which the export is compared with on llama.cpp")
        if optimum_python is not None or _takes_optimum(folder):
            _refuse(True, {"--draft-of": draft_of}, "is for a source that our own graph builder takes")
            chosen = _choose(None, recipe, bits, block)
            _tell(_export_checkpoint(store, folder, to, chosen, python=optimum_python, threads=threads))
            return
    _refuse(not is_checkpoint(folder), {"--optimum-python": optimum_python}, "is for the folder of a checkpoint")
    if draft_of is not None:
        _check_vocabulary(store, source, draft_of)
    if as_gguf:
        print(_requantize(store, source, to, name, type_, pure=pure or draft_of is not None, threads=threads))
        return
    model = _find(store, source)
    made = _export_directly(store, model, to, _choose(model.path, recipe, bits, block), threads)
    if report:
        report_quality(store, model.path, made.path, threads)
    _tell(made)


def _takes_optimum(folder: Path) -> bool:
    """Whether a checkpoint is none for our own graph builder, which is said."""
    from edge_spec.export.source import refusal_of

    refusal = refusal_of(folder)
    if refusal is not None:
        print_note(f"by way of optimum: {refusal}")
    return refusal is not None


def _find(store: Store, source: str) -> LocalModel:
    """The file behind a name or a path, or the folder of a checkpoint."""
    from edge_spec.checkpoint import is_checkpoint, open_checkpoint
    from edge_spec.store import LocalModel

    folder = Path(source).expanduser()
    if not is_checkpoint(folder):
        return store.resolve(source)
    checkpoint = open_checkpoint(folder)
    return LocalModel(checkpoint.name, folder, checkpoint.sha256(store.cache_dir), None)


def _export_directly(store: Store, model: LocalModel, to: str | None, recipe: Recipe, threads: int | None) -> Export:
    from edge_spec.export.exporter import ensure_export, export_model

    with byte_progress(f"export {model.name} as {recipe.name}") as (progress, _):
        if to is None:
            return ensure_export(
                model.path, model.sha256, recipe, store.exports_dir, threads=threads, progress=progress
            )
        path = Path(to).expanduser()
        return export_model(model.path, recipe, path, sha256=model.sha256, threads=threads, progress=progress)


def _export_checkpoint(
    store: Store, folder: Path, to: str | None, recipe: Recipe, *, python: Path | None, threads: int | None
) -> GraphExport:
    from edge_spec.checkpoint import open_checkpoint
    from edge_spec.checkpoint.environment import ensure_environment, find_python
    from edge_spec.checkpoint.exporter import ensure_graph_export, export_graph

    checkpoint = open_checkpoint(folder)
    sha256 = checkpoint.sha256(store.cache_dir)
    with byte_progress(f"export {checkpoint.name} as {recipe.name}") as (progress, note):

        def find() -> Path:
            return find_python(python) or ensure_environment(store.cache_dir, note)

        if to is None:
            return ensure_graph_export(
                checkpoint, sha256, recipe, store.exports_dir, find, note=note, threads=threads, progress=progress
            )
        path = Path(to).expanduser()
        return export_graph(checkpoint, sha256, recipe, path, find, note=note, threads=threads, progress=progress)


def _requantize(
    store: Store, source: str, to: str | None, name: str | None, type_: str | None, *, pure: bool, threads: int | None
) -> Path:
    from edge_spec.export.requantize import DEFAULT_TYPE, check_type, requantize

    model, file_type = store.resolve(source), check_type(type_ or DEFAULT_TYPE)
    name = name or f"{model.name}-{file_type.lower()}"
    with byte_progress(f"export {model.name} as {file_type}", unit="tensors") as (progress, note):

        def make(path: Path) -> None:
            requantize(model.path, path, file_type, pure=pure, threads=threads, progress=progress)

        if to is None:
            made_from = f"{model.sha256} {file_type}{' pure' if pure else ''}"
            path = store.make(name, make, made_from=made_from, source=model, note=note).path
        else:
            path = Path(to).expanduser()
            path = path if path.suffix == ".gguf" else path / f"{name}.gguf"
            make(path)
    print_note(f"{format_size(path.stat().st_size)}" + (f", called {name} in the store" if to is None else ""))
    return path


def _tell(made: Export | GraphExport) -> None:
    if made.requantized:
        print_note(f"no exact form for {', '.join(made.requantized)} tensors: stored with {made.recipe.bits} bits")
    print_note(f"{format_size(made.weight_bytes)} of weights")
    print(made.path)


def _refuse(where: bool, options: dict[str, object], why: str) -> None:
    given = [option for option, value in options.items() if value is not None]
    if where and given:
        raise UsageError(f"{given[0]} {why}")


def _check_vocabulary(store: Store, draft: str, target: str) -> None:
    """Ids of the draft have to mean the same to the target; VocabMismatchError else."""
    from edge_spec.loading import find_source
    from edge_spec.tokenizer import check_same_vocabulary

    check_same_vocabulary(find_source(store, target).tokenizer, find_source(store, draft).tokenizer)


def _choose(path: Path | None, name: str | None, bits: int | None, block: int | None) -> Recipe:
    """The recipe that was asked for; else what follows from the source at `path`, or 8 bits where there is none, as
    for every source of full weights."""
    from edge_spec.export.recipe import RECIPES, Recipe, find_recipe
    from edge_spec.export.source import default_recipe_of

    own = bits is not None or block is not None
    if name is not None:
        if own:
            raise UsageError("--recipe decides bits and block: give --recipe, or --bits and --block")
        return find_recipe(name)
    default = RECIPES["int8"] if path is None else default_recipe_of(path)
    if not own:
        return default
    default = default.throughout()
    bits, block = bits or default.bits, block or default.block
    chosen = Recipe(f"int{bits}-block{block}", bits=bits, block=block, zero_points=bits == 4)
    return next((recipe for recipe in RECIPES.values() if replace(recipe, name=chosen.name) == chosen), chosen)
