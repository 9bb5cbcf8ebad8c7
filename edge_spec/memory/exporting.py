"""What an export holds while it is made: before the model is loaded, in the same process."""

from __future__ import annotations

from edge_spec.export.filling import CHUNK_WEIGHTS
from edge_spec.memory import runtime
from edge_spec.memory.facts import ModelFacts, Origin


def export_bytes(facts: ModelFacts, threads: int) -> int:
    """Anonymous memory beside what the process holds already: each thread turns a chunk of a matrix at a time.
    0 for what is an export already."""
    if facts.origin is Origin.EXPORT:
        return 0
    base = runtime.EXPORTER + runtime.EXPORTER_PER_TOKEN * facts.n_vocab
    return base + threads * CHUNK_WEIGHTS * runtime.EXPORT_BYTES_PER_WEIGHT
