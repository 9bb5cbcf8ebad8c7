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
LEAST_WINDOW = 512
"""A window that memory forces upon the turns to come is not cut below this."""


def make_governor(budget: Budget, target: Session, drafters: Mapping[str, Drafter]) -> Governor:
    """What keeps a target and its draft within `budget`, and out of the way when the machine runs short."""
    model = drafters.get("model")
    ladder = Ladder(target, model if isinstance(model, ModelDrafter) else None)
    signals = machine_signals()
    return Governor(OwnMemory(budget.held.n_bytes), signals, ladder.rungs, on_stop=ladder.halve_window)


class Ladder:
    """The rungs of a target and its draft. Each tells what it did and what that gave back, or None."""

    def __init__(self, target: Session, model: ModelDrafter | None, memory: ProcessMemory | None = None) -> None:
        self._target = target
        self._model = model
        self._memory = memory or process_memory()

    @property
    def rungs(self) -> list[Rung]:
        """Mildest first: no draft model, then no more window than the text at hand needs."""
        return [self.unload_draft, self.fit_window]

    def unload_draft(self) -> str | None:
        """Close the draft model; what is written goes on without it."""
        model = self._model
        if model is None or model.is_unloaded:
            return None
        return f"the draft model was unloaded ({self._saved_by(model.unload)} given back)"

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
