"""Language models on the CPU, fast, inside a RAM budget: a small draft proposes, the quantised target verifies."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edge_spec.types import FinishReason, GenerationResult, Piece, SamplingParams

if TYPE_CHECKING:
    from edge_spec.engine import Engine

__version__ = "0.1.0"
__all__ = ["Engine", "FinishReason", "GenerationResult", "Piece", "SamplingParams", "__version__"]


def __getattr__(name: str) -> Any:
    # The engine pulls in the tokenizer and backends; a bare import stays quick without it.
    if name == "Engine":
        from edge_spec.engine import Engine

        return Engine
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
