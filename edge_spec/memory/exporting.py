"""What an export holds while it is made: before the model is loaded, in the same process."""

from __future__ import annotations

from edge_spec.export.filling import CHUNK_WEIGHTS, corrected_bytes
from edge_spec.export.recipe import Recipe
from edge_spec.memory import runtime
from edge_spec.memory.facts import ModelFacts, Origin


def export_bytes(facts: ModelFacts, recipe: Recipe | None, threads: int) -> int:
    """Anonymous memory beside what the process holds already: each thread turns a chunk of a matrix at a time, or a
    layer at a time is read and corrected. 0 for what is an export already."""
    if facts.origin is Origin.EXPORT:
        return 0
    if facts.config is not None and recipe is not None and recipe.corrected:
        return runtime.CORRECTOR + corrected_bytes(facts.config, threads)
    base = runtime.EXPORTER + runtime.EXPORTER_PER_TOKEN * facts.n_vocab
    return base + threads * CHUNK_WEIGHTS * runtime.EXPORT_BYTES_PER_WEIGHT
