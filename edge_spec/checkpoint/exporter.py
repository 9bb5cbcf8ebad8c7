"""Make an export of a checkpoint by way of optimum, or find the one that was made: a folder of

edge_spec.json  what it is: sizes, recipe, hash of the checkpoint, sizes of the other files; written last
model.onnx      the graph in optimum's layout, with quantised matrices
weights.bin     matrices and tables, mapped by the runtime
source.gguf     the checkpoint's tokenizer, chat template and sizes, as metadata
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edge_spec.checkpoint.folder import Checkpoint
from edge_spec.checkpoint.graph import quantize_graph
from edge_spec.checkpoint.metadata import tokenizer_metadata
from edge_spec.checkpoint.optimum import run_optimum
from edge_spec.errors import ModelFormatError, StorageError, UsageError
from edge_spec.export.filling import ByteProgress
from edge_spec.export.finished import MODEL, SOURCE, WEIGHTS
from edge_spec.export.folder import GRAPH_LAYOUT, REMEDY, check_files, describe, is_export, new_folder, read_description
from edge_spec.export.recipe import Recipe
from edge_spec.store.pull import Note, exclusive

GRAPH_VERSION = 1
"""Raised whenever the same checkpoint and recipe would give other files."""

FindPython = Callable[[], Path]
"""Gives the Python that has optimum; called only where it is needed."""


@dataclass(frozen=True, slots=True)
class GraphConfig:
    """The sizes of a model whose graph was made by optimum."""

    architecture: str
    n_layer: int
    hidden: int
    n_head: int
    n_kv_head: int
    head_dim: int
    n_vocab: int
    n_ctx_train: int


@dataclass(frozen=True, slots=True)
class GraphExport:
    """A finished export in optimum's layout. `weight_bytes` counts packed matrices and scales."""

    path: Path
    config: GraphConfig
    recipe: Recipe
    source_sha256: str
    weight_bytes: int
    requantized: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """What, besides the source, decides its bytes."""
        return graph_key(self.recipe)

    @property
    def model_file(self) -> Path:
        """The ONNX graph."""
        return self.path / MODEL

    @property
    def source_file(self) -> Path:
        """A GGUF of the tokenizer, the chat template and the sizes."""
        return self.path / SOURCE


def graph_key(recipe: Recipe) -> str:
    """What, besides the source, decides the bytes of an export in optimum's layout, as eight hex digits."""
    identity = json.dumps([GRAPH_LAYOUT, GRAPH_VERSION, recipe.to_json()], sort_keys=True)
    return hashlib.sha256(identity.encode()).hexdigest()[:8]


def open_graph_export(path: Path) -> GraphExport:
    """Read an export's description and check that its files are whole; ModelFormatError says what is wrong."""
    described = read_description(path)
    try:
        check_files(path, described, GRAPH_VERSION)
        return GraphExport(
            path=path,
            config=GraphConfig(**described["decoder"]),
            recipe=Recipe.from_json(described["recipe"]),
            source_sha256=described["source_sha256"],
            weight_bytes=described["weight_bytes"],
        )
    except (KeyError, TypeError, AttributeError) as exc:
        raise ModelFormatError(f"{path} has a description that is not complete: {exc!r}") from exc


def ensure_graph_export(
    checkpoint: Checkpoint,
    sha256: str,
    recipe: Recipe,
    exports_dir: Path,
    find_python: FindPython,
    *,
    note: Note,
    threads: int | None = None,
    progress: ByteProgress | None = None,
) -> GraphExport:
    """The store's export of a checkpoint by a recipe, made now if there is none that is whole.

    Raises what `export_graph` raises.
    """
    recipe = recipe.throughout()
    path = exports_dir / sha256 / f"{recipe.name}-{graph_key(recipe)}"
    try:
        with exclusive(path.parent / "lock", note, checkpoint.name):
            if is_export(path):
                try:
                    return open_graph_export(path)
                except ModelFormatError as damage:
                    note(f"making it anew: {damage}")
                    shutil.rmtree(path)
            return export_graph(
                checkpoint, sha256, recipe, path, find_python, note=note, threads=threads, progress=progress
            )
    except OSError as exc:
        raise StorageError(f"the export could not be written below {exports_dir}: {exc}; {REMEDY}") from exc


def export_graph(
    checkpoint: Checkpoint,
    sha256: str,
    recipe: Recipe,
    path: Path,
    find_python: FindPython,
    *,
    note: Note,
    threads: int | None = None,
    progress: ByteProgress | None = None,
) -> GraphExport:
    """Export a checkpoint into the new folder `path`, which appears whole or not at all.

    The checkpoint itself is checked before optimum is started. Its projections have names of their own, so a recipe
    that stores some of them finer stores all alike (`Recipe.throughout`).

    Raises ModelFormatError, UnsupportedArchitectureError, BackendError, StorageError, UsageError if `path` exists, and
    what `find_python` raises.
    """
    if path.exists():
        raise UsageError(f"{path} exists already; remove it or name another folder")
    recipe = recipe.throughout()
    if recipe.exact or recipe.head_rows:
        raise UsageError(f"the recipe {recipe.name} takes a GGUF: a checkpoint has no such tensors, and a whole head")
    n_vocab = checkpoint.get_int("vocab_size")
    keys = tokenizer_metadata(checkpoint, n_vocab)
    n_weights = _count_weights(checkpoint)
    python = find_python()
    # The float32 graph lies beside the export until it is quantised.
    with new_folder(path, 4 * n_weights + n_weights * recipe.bits // 8 + (64 << 20)) as folder:
        note(
            f"optimum builds the graph of {checkpoint.name}: it takes a minute or more, "
            f"and about {5 * 4 * n_weights >> 20} MiB of memory"
        )
        whole = folder / "optimum"
        whole.mkdir()
        graph = run_optimum(checkpoint, python, whole)
        shape, weight_bytes = quantize_graph(
            graph, folder / MODEL, folder / WEIGHTS, recipe, threads=threads, progress=progress
        )
        shutil.rmtree(whole)
        if shape.n_vocab != n_vocab:
            raise ModelFormatError(
                f"{checkpoint.path}: its graph gives {shape.n_vocab} logits, and vocab_size says {n_vocab}"
            )
        config = GraphConfig(
            architecture=checkpoint.model_type,
            n_layer=shape.n_layer,
            hidden=checkpoint.get_int("hidden_size", "n_embd", "d_model"),
            n_head=checkpoint.get_int("num_attention_heads", "n_head"),
            n_kv_head=shape.n_kv_head,
            head_dim=shape.head_dim,
            n_vocab=shape.n_vocab,
            n_ctx_train=checkpoint.get_int("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx"),
        )
        _write_metadata(folder / SOURCE, config, keys)
        described = {
            "layout": GRAPH_LAYOUT,
            "exporter_version": GRAPH_VERSION,
            "source_sha256": sha256,
            "recipe": recipe.to_json(),
            "decoder": asdict(config),
            "weight_bytes": weight_bytes,
        }
        describe(folder, described)
    return open_graph_export(path)


def _count_weights(checkpoint: Checkpoint) -> int:
    """Weights in the files, whose headers are checked by the way."""
    with checkpoint.open_weights() as tensors:
        return sum(file.tensors[name].n_values for name, file in tensors.items())


def _write_metadata(path: Path, config: GraphConfig, keys: Mapping[str, Any]) -> None:
    from edge_spec.formats.gguf_writer import write_metadata

    name = config.architecture
    sizes = {
        "general.architecture": name,
        f"{name}.context_length": config.n_ctx_train,
        f"{name}.embedding_length": config.hidden,
        f"{name}.block_count": config.n_layer,
        f"{name}.attention.head_count": config.n_head,
        f"{name}.attention.head_count_kv": config.n_kv_head,
        f"{name}.attention.key_length": config.head_dim,
        f"{name}.attention.value_length": config.head_dim,
        f"{name}.vocab_size": config.n_vocab,
    }
    write_metadata(path, sizes | dict(keys))
