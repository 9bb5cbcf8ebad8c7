"""What a conversation asks of the policy that keeps its context."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from edge_spec.types import Hole, Prompt


@dataclass(frozen=True, slots=True)
class Answered:
    """How a turn ended. `ids` stand for `text`; `holes` are all that its context has."""

    text: str
    ids: list[int]
    holes: Sequence[Hole]


@dataclass(frozen=True, slots=True)
class Asking:
    """A question that is ready to be answered. Nothing has changed until it is settled."""

    prompt: Prompt
    settle: Callable[[Answered | None], None]
    """Called when the answer has ended; None if nothing was written."""


class Keeper(Protocol):
    """The context of one conversation."""

    def ask(self, question: str, *, n_ctx: int, max_tokens: int | None) -> Asking:
        """The prompt for the next turn, of less than `n_ctx` tokens where the policy can bring that about."""
        ...

    def prune(self, max_tokens: int) -> int:
        """Drop what has to go for the context to have at most `max_tokens`; returns how many tokens went."""
        ...

    def reset(self) -> None:
        """Forget everything."""
        ...
