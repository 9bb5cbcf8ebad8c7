"""What an engine gives back when memory is short, mildest first; the governor decides when."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from edge_spec.decoding.drafter import Drafter
from edge_spec.drafting import ModelDrafter
from edge_spec.memory.budget import Budget
from edge_spec.memory.governor import Governor, Rung
from edge_spec.memory.pressure import OwnMemory, machine_signals
from edge_spec.memory.process import ProcessMemory, process_memory, release_free_memory
from edge_spec.sizes import format_size


def make_governor(budget: Budget, drafters: Mapping[str, Drafter]) -> Governor:
    """What keeps a target and its draft within `budget`, and out of the way when the machine runs short."""
    model = drafters.get("model")
    rungs = make_rungs(model if isinstance(model, ModelDrafter) else None)
    return Governor(OwnMemory(budget.held.n_bytes), machine_signals(), rungs)


def make_rungs(model: ModelDrafter | None, memory: ProcessMemory | None = None) -> list[Rung]:
    """The rungs, mildest first: unload the draft."""
    measured = _Measured(memory or process_memory())
    rungs: list[Rung] = []
    if model is not None:
        rungs.append(lambda: _unload(model, measured))
    return rungs


def _unload(model: ModelDrafter, measured: _Measured) -> str | None:
    if model.is_unloaded:
        return None
    return f"the draft model was unloaded ({measured(model.unload)} given back)"


class _Measured:
    """Does something and tells, as text, how much less the process holds afterwards."""

    def __init__(self, memory: ProcessMemory) -> None:
        self._memory = memory

    def __call__(self, give_back: Callable[[], object]) -> str:
        before = self._memory.read().anonymous_bytes
        give_back()
        release_free_memory()
        return format_size(max(0, before - self._memory.read().anonymous_bytes))
