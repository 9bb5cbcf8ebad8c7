"""Make an export, or find the one that was made: a folder with the graph, its weights and what the source said.

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
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Lock
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from edge_spec.errors import ModelFormatError, StorageError, UnsupportedArchitectureError, UsageError
from edge_spec.export.architecture import DecoderConfig, bias_shapes, tensor_shapes
from edge_spec.export.folder import DESCRIPTION, REMEDY, check_files, describe, is_export, new_folder, read_description
from edge_spec.export.graph import Weights, build_graph
from edge_spec.export.layout import Job, Layout, plan_layout
from edge_spec.export.quantize import QuantizedRows, pack_zeros, quantize_rows, repack_exact
from edge_spec.export.reading import read_config
from edge_spec.export.recipe import Recipe
from edge_spec.export.trim import head_ids
from edge_spec.formats.gguf import GGUFFile
from edge_spec.formats.gguf_subset import write_subset
from edge_spec.store.pull import exclusive

EXPORTER_VERSION = 3
"""Raised whenever the same source and recipe would give other files, so that no old export is reused."""

MODEL, WEIGHTS, SOURCE = "model.onnx", "weights.bin", "source.gguf"
HEAD_IDS = "head_ids.npy"

CHUNK_WEIGHTS = 1 << 20
"""Weights that a worker turns at a time: its temporaries stay in the cache and the peak stays small."""

ByteProgress = Callable[[int, int], object]
"""Called as `progress(done_bytes, total_bytes)` of the source tensors."""


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
            recipe=Recipe(**described["recipe"]),
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
    """The store's export of a GGUF by a recipe, made now if there is none, or none that is whole.

    Keyed by the source's hash, the recipe and the exporter's version; two processes do not make the same one at once.
    Raises what `export_model` raises.
    """
    path = exports_dir / sha256 / f"{recipe.name}-{export_key(recipe)}"
    if (found := _whole_export(path)) is not None:
        return found

    def show_the_wait(_: str) -> None:
        if progress is not None:
            progress(0, source.stat().st_size)

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
    identity = json.dumps([EXPORTER_VERSION, asdict(recipe)], sort_keys=True)
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
    """Export the GGUF `source` into the new folder `path`.

    The folder appears whole or not at all: files are written beside it under a temporary name, and whatever an
    interrupted run left there is removed first. Raises ModelFormatError, UnsupportedArchitectureError (the message
    names what is not known), StorageError, UsageError if `path` exists.
    """
    if path.exists():
        raise UsageError(f"{path} exists already; remove it or name another folder")
    with GGUFFile(source) as gguf:
        config = read_config(gguf)
        kept = head_ids(gguf, config.n_vocab, recipe.head_rows)
        layout = plan_layout(gguf, config, recipe, kept)
        tables = ["token_embd.weight"] if kept is None or config.tied else ["token_embd.weight", config.head_tensor]
        table_bytes = sum(gguf.tensors[name].n_bytes for name in tables)
        with new_folder(path, layout.n_bytes + table_bytes + (64 << 20)) as folder:
            with (folder / WEIGHTS).open("wb") as file:
                _fill(gguf, layout, file, threads or os.cpu_count() or 1, progress)
            _write_graph(gguf, config, layout, folder)
            write_subset(gguf, folder / SOURCE, tables)
            if kept is not None:
                np.save(folder / HEAD_IDS, kept)
            _describe(config, recipe, layout, sha256, folder)
    return open_export(path)


def _write_graph(gguf: GGUFFile, config: DecoderConfig, layout: Layout, folder: Path) -> None:
    weights = Weights(layout.matrices, _vectors(gguf, config))
    model = build_graph(config, weights, weights_file=WEIGHTS)
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
        "recipe": asdict(recipe),
        "decoder": config.to_json(),
        "weight_bytes": layout.weight_bytes,
        "requantized": sorted(requantized),
    }
    describe(folder, described)


def _fill(gguf: GGUFFile, layout: Layout, file: BinaryIO, threads: int, progress: ByteProgress | None) -> None:
    """Turn every source tensor, some rows at a time on each thread (NumPy lets go of the interpreter's lock)."""
    file.truncate(layout.n_bytes)
    total, done = sum(job.tensor.row_bytes * job.n_rows for job in layout.jobs), 0
    lock = Lock()

    def turn(job: Job, rows: slice) -> None:
        nonlocal done
        quantized = _quantize(gguf, job, rows)
        matrix, first = job.matrix, job.first_row + rows.start
        with lock:
            stored = [(matrix.packed, quantized.packed), (matrix.scales, quantized.scales)]
            if matrix.zeros is not None and quantized.zeros is not None:
                stored.append((matrix.zeros, pack_zeros(quantized.zeros, matrix.bits)))
            for span, values in stored:
                file.seek(span.offset + first * (span.length // matrix.n_rows))
                file.write(np.ascontiguousarray(values).data)
            done += job.tensor.row_bytes * (rows.stop - rows.start)
            if progress is not None:
                progress(min(done, total), total)

    with ThreadPoolExecutor(threads) as pool:
        futures = [pool.submit(turn, job, rows) for job in layout.jobs for rows in _row_chunks(job)]
        try:
            for future in futures:
                future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    if progress is not None:
        progress(total, total)


def _row_chunks(job: Job) -> Iterator[slice]:
    n_rows, row_length = job.n_rows, job.tensor.shape[1]
    step = max(1, CHUNK_WEIGHTS // row_length)
    return (slice(start, min(start + step, n_rows)) for start in range(0, n_rows, step))


def _quantize(gguf: GGUFFile, job: Job, rows: slice) -> QuantizedRows:
    name, wanted = job.tensor.name, rows if job.picked is None else job.picked[rows]
    if job.exact:
        return repack_exact(gguf.raw(name)[wanted], job.tensor.type)
    weights = gguf.dequantize(name, wanted)
    if not np.isfinite(weights).all():
        raise ModelFormatError(f"{gguf.path}: {name} holds values that are not finite")
    zero_points = job.matrix.zeros is not None
    return quantize_rows(weights, bits=job.matrix.bits, block=job.matrix.block, zero_points=zero_points)
