"""What to keep of a context when the window or the memory is full; one file a policy."""

from edge_spec.context.transcript import Transcript
from edge_spec.context.turns import ByTurns

ON_FULL = ("turns", "error")
"""What a conversation can do when it outgrows the window."""

__all__ = ["ON_FULL", "ByTurns", "Transcript"]
