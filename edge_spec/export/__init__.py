"""From a GGUF to an ONNX graph of 4- or 8-bit matrices, in NumPy and onnx alone."""

from edge_spec.export.exporter import Export, ensure_export, export_model, open_export
from edge_spec.export.recipe import RECIPES, Recipe, default_recipe, find_recipe

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
