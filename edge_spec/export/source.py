"""What an export is made of: a GGUF, or a checkpoint that reads like one."""

from __future__ import annotations

from pathlib import Path

from edge_spec.checkpoint.folder import is_checkpoint, open_checkpoint
from edge_spec.errors import UnsupportedArchitectureError
from edge_spec.export.reading import read_config
from edge_spec.export.recipe import Recipe, default_recipe
from edge_spec.formats.gguf import GGUFFile


def open_source(path: Path) -> GGUFFile:
    """Open a GGUF, or the folder of a checkpoint as the GGUF that would be made of it.

    Raises ModelNotFoundError, ModelFormatError, and UnsupportedArchitectureError for a checkpoint of a family that
    the exporter does not build.
    """
    if is_checkpoint(path):
        from edge_spec.checkpoint.source import CheckpointSource

        return CheckpointSource(open_checkpoint(path))
    return GGUFFile(path)


def default_recipe_of(path: Path) -> Recipe:
    """The recipe of a GGUF or of a checkpoint's folder where none is asked for: it follows the source.

    Raises what `open_source` raises.
    """
    with open_source(path) as source:
        return default_recipe(source)


def source_bytes(path: Path) -> int:
    """What the weights of a GGUF or of a checkpoint's folder take on disk."""
    return open_checkpoint(path).weight_bytes if is_checkpoint(path) else path.stat().st_size


def refusal_of(checkpoint: Path) -> UnsupportedArchitectureError | None:
    """Why our own graph builder would not take a checkpoint's folder; None where it does.

    ModelFormatError where it is damaged.
    """
    try:
        with open_source(checkpoint) as source:
            read_config(source)
    except UnsupportedArchitectureError as exc:
        return exc
    return None
