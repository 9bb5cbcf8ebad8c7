"""Make an export, or find the one that was made. A checkpoint is read as the GGUF that would be made of it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edge_spec.errors import ModelFormatError, StorageError, UsageError
from edge_spec.export.architecture import DecoderConfig, bias_shapes, tensor_shapes
from edge_spec.export.filling import ByteProgress, Filler
from edge_spec.export.finished import HEAD_IDS, MODEL, SOURCE, WEIGHTS, Export, describe_export, export_key, open_export
from edge_spec.export.folder import REMEDY, is_export, new_folder
from edge_spec.export.graph import Weights, build_graph
from edge_spec.export.layout import Layout, plan_layout
from edge_spec.export.reading import read_config
from edge_spec.export.recipe import Recipe
from edge_spec.export.source import open_source, source_bytes
from edge_spec.export.trim import head_ids
from edge_spec.formats.gguf import GGUFFile
from edge_spec.formats.gguf_subset import write_subset
from edge_spec.store.pull import exclusive


def ensure_export(
    source: Path,
    sha256: str,
    recipe: Recipe,
    exports_dir: Path,
    *,
    threads: int | None = None,
    progress: ByteProgress | None = None,
) -> Export:
    """The store's export of a GGUF or a checkpoint's folder by a recipe, made now if there is none that is whole.

    Keyed by the source's hash, the recipe and the exporter's version; two processes do not make the same one at once.
    Raises what `export_model` raises.
    """
    path = exports_dir / sha256 / f"{recipe.name}-{export_key(recipe)}"
    if (found := _whole_export(path)) is not None:
        return found

    def show_the_wait(_: str) -> None:
        if progress is not None:
            progress(0, source_bytes(source))

    try:
        with exclusive(path.parent / "lock", show_the_wait, source.name):
            if (found := _whole_export(path)) is not None:
                return found
            if path.exists():
                shutil.rmtree(path)
            made = export_model(source, recipe, path, sha256=sha256, threads=threads, progress=progress)
            for older in path.parent.glob(f"{recipe.name}-????????"):
                if older != path:  # of an exporter before this one
                    shutil.rmtree(older, ignore_errors=True)
            return made
    except OSError as exc:
        raise StorageError(f"the export could not be written below {exports_dir}: {exc}; {REMEDY}") from exc


def _whole_export(path: Path) -> Export | None:
    """The export at `path`, None if there is none or something damaged it."""
    try:
        return open_export(path) if is_export(path) else None
    except ModelFormatError:
        return None


def export_model(
    source: Path,
    recipe: Recipe,
    path: Path,
    *,
    sha256: str,
    threads: int | None = None,
    progress: ByteProgress | None = None,
) -> Export:
    """Export `source`, a GGUF or the folder of a checkpoint of a known family, into the new folder `path`.

    The folder appears whole or not at all: files are written beside it under a temporary name, and whatever an
    interrupted run left there is removed first. Raises ModelFormatError, UnsupportedArchitectureError (the message
    names what is not known), StorageError, UsageError if `path` exists.
    """
    if path.exists():
        raise UsageError(f"{path} exists already; remove it or name another folder")
    with open_source(source) as gguf:
        config = read_config(gguf)
        kept = head_ids(gguf, config.n_vocab, recipe.head_rows)
        layout = plan_layout(gguf, config, recipe, kept)
        tables = ["token_embd.weight"] if kept is None or config.tied else ["token_embd.weight", config.head_tensor]
        table_bytes = sum(gguf.tensors[name].n_bytes for name in tables)
        with new_folder(path, layout.n_bytes + table_bytes + (64 << 20)) as folder:
            with (folder / WEIGHTS).open("wb") as file:
                Filler(gguf, layout, file, threads or os.cpu_count() or 1, progress).fill()
            _write_graph(config, layout, _vectors(gguf, config), folder)
            write_subset(gguf, folder / SOURCE, tables)
            if kept is not None:
                np.save(folder / HEAD_IDS, kept)
            requantized = {job.tensor.type.name for job in layout.jobs if recipe.exact and not job.exact}
            describe_export(Export(folder, config, recipe, sha256, layout.weight_bytes, tuple(sorted(requantized))))
    return open_export(path)


def _write_graph(config: DecoderConfig, layout: Layout, vectors: dict[str, NDArray[np.float32]], folder: Path) -> None:
    model = build_graph(config, Weights(layout.matrices, vectors), weights_file=WEIGHTS)
    (folder / MODEL).write_bytes(model.SerializeToString())


def _vectors(gguf: GGUFFile, config: DecoderConfig) -> dict[str, NDArray[np.float32]]:
    """Norm gains and biases, float32; query, key and value biases joined as their projections are."""
    names = [name for name, shape in tensor_shapes(config).items() if len(shape) == 1]
    vectors = {name: gguf.dequantize(name).reshape(-1) for name in names}
    shapes = bias_shapes(config)
    biases = {name: gguf.dequantize(name).reshape(-1) for name in shapes if name in gguf.tensors}
    for layer in range(config.n_layer):
        parts = [f"blk.{layer}.attn_{part}.bias" for part in "qkv"]
        if any(part in biases for part in parts):
            found = [biases.pop(part, np.zeros(shapes[part], np.float32)) for part in parts]
            vectors[f"blk.{layer}.attn_qkv.bias"] = np.concatenate(found)
    return vectors | biases
