"""Make an export, or find the one that was made: a folder with the graph, its weights and what the source said.
A checkpoint is read as the GGUF that would be made of it.

edge_spec.json  what it is: decoder, recipe, source hash, sizes of the other files; written last
model.onnx      the graph, with the small vectors inside
weights.bin     packed matrices and their scales, mapped by the runtime
source.gguf     the source's metadata (tokenizer, chat template) and its embedding table as it was
head_ids.npy    where the output head is trimmed: the ids of its rows; source.gguf then has the whole head too
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_spec.errors import ModelFormatError, StorageError, UnsupportedArchitectureError, UsageError
from edge_spec.export.architecture import DecoderConfig, bias_shapes, tensor_shapes
from edge_spec.export.filling import ByteProgress, Filler
from edge_spec.export.folder import DESCRIPTION, REMEDY, check_files, describe, is_export, new_folder, read_description
from edge_spec.export.graph import Weights, build_graph
from edge_spec.export.layout import Layout, plan_layout
from edge_spec.export.reading import read_config
from edge_spec.export.recipe import Recipe
from edge_spec.export.source import open_source, source_bytes
from edge_spec.export.trim import head_ids
from edge_spec.formats.gguf import GGUFFile
from edge_spec.formats.gguf_subset import write_subset
from edge_spec.store.pull import exclusive

EXPORTER_VERSION = 5
"""Raised whenever the same source and recipe would give other files, so that no old export is reused."""

MODEL, WEIGHTS, SOURCE = "model.onnx", "weights.bin", "source.gguf"
HEAD_IDS = "head_ids.npy"


@dataclass(frozen=True, slots=True)
class Export:
    """A finished export. `weight_bytes` counts packed matrices and scales."""

    path: Path
    config: DecoderConfig
    recipe: Recipe
    source_sha256: str
    weight_bytes: int
    requantized: tuple[str, ...]
    """With an exact recipe: the source types that could not be carried over bit for bit."""

    @property
    def key(self) -> str:
        """What, besides the source, decides its bytes."""
        return export_key(self.recipe)

    @property
    def model_file(self) -> Path:
        """The ONNX graph."""
        return self.path / MODEL

    @property
    def weights_file(self) -> Path:
        """The packed matrices and their scales."""
        return self.path / WEIGHTS

    @property
    def source_file(self) -> Path:
        """A GGUF of the source's metadata and embedding table."""
        return self.path / SOURCE

    def read_head_ids(self) -> NDArray[np.int64] | None:
        """Ids of the output head's rows, increasing; None where the head is whole. ModelFormatError if damaged."""
        file = self.path / HEAD_IDS
        if not file.exists():
            return None
        try:
            ids = np.load(file, allow_pickle=False)
        except (OSError, ValueError) as exc:
            raise ModelFormatError(f"{file} cannot be read ({exc}): export it again") from exc
        if ids.ndim != 1 or ids.dtype != np.int64 or not len(ids) or ids[0] < 0 or ids[-1] >= self.config.n_vocab:
            raise ModelFormatError(f"{file} does not hold ids of the vocabulary: export it again")
        return np.asarray(ids, np.int64)


def open_export(path: Path) -> Export:
    """Read an export's description and check that its files are whole; ModelFormatError says what is wrong."""
    described = read_description(path)
    if "layout" in described:
        raise UnsupportedArchitectureError(f"{path} is an export of a checkpoint, with a graph that optimum built")
    try:
        check_files(path, described, EXPORTER_VERSION)
        return Export(
            path=path,
            config=DecoderConfig.from_json(described["decoder"]),
            recipe=Recipe.from_json(described["recipe"]),
            source_sha256=described["source_sha256"],
            weight_bytes=described["weight_bytes"],
            requantized=tuple(described["requantized"]),
        )
    except (KeyError, TypeError, AttributeError) as exc:
        raise ModelFormatError(f"{path / DESCRIPTION} is not complete: {exc!r}") from exc


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


def export_key(recipe: Recipe) -> str:
    """What, besides the source, decides the bytes of an export, as eight hex digits."""
    identity = json.dumps([EXPORTER_VERSION, recipe.to_json()], sort_keys=True)
    return hashlib.sha256(identity.encode()).hexdigest()[:8]


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
            _describe(config, recipe, layout, sha256, folder)
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


def _describe(config: DecoderConfig, recipe: Recipe, layout: Layout, sha256: str, folder: Path) -> None:
    requantized = {job.tensor.type.name for job in layout.jobs if recipe.exact and not job.exact}
    described: dict[str, Any] = {
        "exporter_version": EXPORTER_VERSION,
        "source_sha256": sha256,
        "recipe": recipe.to_json(),
        "decoder": config.to_json(),
        "weight_bytes": layout.weight_bytes,
        "requantized": sorted(requantized),
    }
    describe(folder, described)
