"""A finished export: a folder with the graph, its weights and what the source said. It is read without the exporter.

edge_spec.json  what it is: decoder, recipe, source hash, sizes of the other files; written last
model.onnx      the graph, with the small vectors inside
weights.bin     packed matrices and their scales, mapped by the runtime
source.gguf     the source's metadata (tokenizer, chat template) and its embedding table as it was
head_ids.npy    where the output head is trimmed: the ids of its rows; source.gguf then has the whole head too
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edge_spec.errors import ModelFormatError, UnsupportedArchitectureError
from edge_spec.export.architecture import DecoderConfig
from edge_spec.export.folder import DESCRIPTION, check_files, describe, read_description
from edge_spec.export.recipe import Recipe

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


def export_key(recipe: Recipe) -> str:
    """What, besides the source, decides the bytes of an export, as eight hex digits."""
    identity = json.dumps([EXPORTER_VERSION, recipe.to_json()], sort_keys=True)
    return hashlib.sha256(identity.encode()).hexdigest()[:8]


def describe_export(export: Export) -> None:
    """Write what `open_export` reads, into a folder whose other files are written."""
    described = {
        "exporter_version": EXPORTER_VERSION,
        "source_sha256": export.source_sha256,
        "recipe": export.recipe.to_json(),
        "decoder": export.config.to_json(),
        "weight_bytes": export.weight_bytes,
        "requantized": export.requantized,
    }
    describe(export.path, described)


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
