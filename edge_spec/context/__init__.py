"""What to keep of a context when the window or the memory is full; one file a policy."""

from edge_spec.context.keeper import Answered, Asking, Keeper
from edge_spec.context.sinks import SinkKeeper, Sinks, Stretch, read_on, report
from edge_spec.context.surprisal import Surprisal, draft_score
from edge_spec.context.transcript import Transcript
from edge_spec.context.turns import ByTurns, TurnKeeper, WholeTurns
from edge_spec.errors import UsageError

ON_FULL = ("turns", "sinks", "error")
"""What a conversation can do when it outgrows the window."""


def make_keeper(on_full: str, transcript: Transcript) -> Keeper:
    """The context of a new conversation, by the policy's name. Raises UsageError for one that is not known."""
    if on_full not in ON_FULL:
        raise UsageError(f"on_full={on_full!r}: choose one of {', '.join(ON_FULL)}")
    if on_full == "sinks":
        return SinkKeeper(transcript)
    return TurnKeeper(transcript, ByTurns() if on_full == "turns" else None)


__all__ = [
    "ON_FULL",
    "Answered",
    "Asking",
    "ByTurns",
    "Keeper",
    "SinkKeeper",
    "Sinks",
    "Stretch",
    "Surprisal",
    "Transcript",
    "TurnKeeper",
    "WholeTurns",
    "draft_score",
    "make_keeper",
    "read_on",
    "report",
]
