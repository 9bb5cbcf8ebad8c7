"""From a GGUF to an ONNX graph of 4- or 8-bit matrices, in NumPy and onnx alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edge_spec.export.finished import Export, open_export
from edge_spec.export.recipe import RECIPES, Recipe, default_recipe, find_recipe

if TYPE_CHECKING:
    from edge_spec.export.exporter import ensure_export, export_model

__all__ = [
    "RECIPES",
    "Export",
    "Recipe",
    "default_recipe",
    "ensure_export",
    "export_model",
    "find_recipe",
    "open_export",
]


def __getattr__(name: str) -> Any:
    # The exporter stays out of what only reads an export, or counts what one would take.
    if name in ("ensure_export", "export_model"):
        from edge_spec.export import exporter

        return getattr(exporter, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
