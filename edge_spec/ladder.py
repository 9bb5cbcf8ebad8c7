"""What an engine gives back when memory is short, mildest first; the governor decides when."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from edge_spec.decoding.drafter import Drafter
from edge_spec.decoding.session import Session
from edge_spec.drafting import ModelDrafter
from edge_spec.errors import BackendError, RollbackUnsupportedError
from edge_spec.memory.budget import Budget
from edge_spec.memory.governor import Governor, Rung
from edge_spec.memory.pressure import OwnMemory, machine_signals
from edge_spec.memory.process import ProcessMemory, process_memory, release_free_memory
from edge_spec.sizes import format_size

ROOM_TOKENS = 256
"""What a window that is cut down leaves for the rest of the answer."""
WORTH_SAVING = 0.8
"""A window is cut down to this share of what it was, or less; else it is not worth the copying."""
LEAST_PRUNED = 512
"""A context of fewer tokens is not pruned."""
LEAST_WINDOW = 512
"""A window that memory forces upon the turns to come is not cut below this."""


Prune = Callable[[int], int]
"""Evicts so that the context at hand has at most so many tokens, if its policy lets it; returns how many went."""


def make_governor(budget: Budget, ladder: Ladder) -> Governor:
    """What keeps a target and its draft within `budget`, and out of the way when the machine runs short."""
    own = OwnMemory(budget.held.n_bytes)
    return Governor(own, machine_signals(), ladder.rungs, on_stop=ladder.halve_window)


def make_ladder(target: Session, drafters: Mapping[str, Drafter]) -> Ladder:
    """The rungs of a target and, where it has one, of its draft model."""
    model = drafters.get("model")
    return Ladder(target, model if isinstance(model, ModelDrafter) else None)


class Ladder:
    """The rungs of a target and its draft. Each tells what it did and what that gave back, or None."""

    def __init__(self, target: Session, model: ModelDrafter | None, memory: ProcessMemory | None = None) -> None:
        self._target = target
        self._model = model
        self._memory = memory or process_memory()
        self._prune: Prune | None = None

    def attend(self, prune: Prune | None) -> None:
        """The generation that begins can be pruned by this; None: it cannot."""
        self._prune = prune

    @property
    def rungs(self) -> list[Rung]:
        """No parked chats; no draft model; half of the context; no more window than what is left of it needs.

        The last two alternate until neither has anything to give.
        """
        return [self.give_up_parked, self.unload_draft, self.prune_context, self.fit_window]

    def give_up_parked(self) -> str | None:
        """Forget the sequences that others have displaced, and keep none from now on."""
        sessions = [self._target, *([self._model.session] if self._model else [])]
        held = any(session.parked_bytes for session in sessions)

        def stop() -> None:
            for session in sessions:
                session.stop_parking()

        saved = self._saved_by(stop)
        return f"parked chats were given up ({saved} given back)" if held else None

    def unload_draft(self) -> str | None:
        """Close the draft model; what is written goes on without it."""
        model = self._model
        if model is None or model.is_unloaded:
            return None
        return f"the draft model was unloaded ({self._saved_by(model.unload)} given back)"

    def prune_context(self) -> str | None:
        """Drop half of the context, so that the window can be cut further.

        Not before a window has been cut that is more than half empty: that costs no text.
        """
        length = self._target.asked_length
        spec = self._target.spec
        if self._prune is None or not spec.can_resize or length < max(LEAST_PRUNED, spec.n_ctx // 2):
            return None
        gone = self._prune(length // 2)
        return f"{gone} tokens were dropped from the context of {length}" if gone else None

    def fit_window(self) -> str | None:
        """Make the target's cache as long as the text so far, and some tokens more."""
        return self._cut_window(self._target.asked_length + ROOM_TOKENS)

    def halve_window(self) -> str | None:
        """Halve the window for the turns to come, from which the oldest ones then go."""
        return self._cut_window(max(LEAST_WINDOW, self._target.spec.n_ctx // 2))

    def _cut_window(self, wanted: int) -> str | None:
        spec = self._target.spec
        n_ctx = -(-wanted // 64) * 64
        if not spec.can_resize or n_ctx > WORTH_SAVING * spec.n_ctx:
            return None
        try:
            saved = self._saved_by(lambda: self._target.resize(n_ctx))
        except (BackendError, RollbackUnsupportedError, MemoryError):
            return None  # a copy has to fit beside what it is made of; the next rung frees more
        return f"the window was cut from {spec.n_ctx} to {n_ctx} tokens ({saved} given back)"

    def _saved_by(self, give_back: Callable[[], object]) -> str:
        """Do it; returns how much less the process holds afterwards."""
        before = self._memory.read().anonymous_bytes
        give_back()
        release_free_memory()
        return format_size(max(0, before - self._memory.read().anonymous_bytes))
