"""What a target, its draft and the process hold in memory, part by part, before anything is loaded.

Three totals. *Committed*: anonymous memory at a full context, which has to fit or the process dies. *Working set*: that
and the pages of mapped files that every token touches, which have to fit or the machine pages. *Load peak*: the most
committed memory while the models are brought up, one after the other.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from edge_spec.export.recipe import RECIPES
from edge_spec.memory.facts import ModelFacts, Origin
from edge_spec.memory.model_parts import model_parts
from edge_spec.memory.parts import Component, Owner, Settings
from edge_spec.memory.process_parts import process_parts


@dataclass(frozen=True)
class Estimate:
    """What a run would hold. Sizes in bytes; see the module for the three totals."""

    target: ModelFacts
    draft: ModelFacts | None
    settings: Settings
    components: tuple[Component, ...]

    @cached_property
    def committed_bytes(self) -> int:
        """Anonymous memory with a full context."""
        return sum(part.committed_bytes for part in self.components)

    @cached_property
    def working_set_bytes(self) -> int:
        """Committed memory and the mapped pages that every token reads."""
        return self.committed_bytes + sum(part.touched_bytes for part in self.components)

    @cached_property
    def reserved_bytes(self) -> int:
        """Allocated and not touched; `committed_bytes + reserved_bytes + band_bytes` is a safe RLIMIT_DATA."""
        return sum(part.reserved_bytes for part in self.components)

    @cached_property
    def load_peak_bytes(self) -> int:
        """Most committed memory while loading: the process's parts come first, then the target's, then the draft's.

        What is filled later is empty then: on ONNX Runtime and OpenVINO the cache too; llama.cpp writes zeros to it.
        """
        held = peak = 0
        for owner in (Owner.PROCESS, Owner.TARGET, Owner.DRAFT):
            parts = [part for part in self.components if part.owner is owner]
            peak = max(peak, held + max((part.load_bytes for part in parts), default=0))
            held += sum(part.committed_bytes for part in parts if not part.filled_later)
        return max(peak, held)

    @cached_property
    def peak_bytes(self) -> int:
        """Most committed memory of the whole run."""
        return max(self.committed_bytes, self.load_peak_bytes)

    @property
    def band_bytes(self) -> int:
        """How far above the estimate a run may come."""
        return band_bytes(self.peak_bytes)

    def fits(self, budget_bytes: int) -> bool:
        """Whether the run stays within a budget even at the upper end of the band."""
        return self.peak_bytes + self.band_bytes <= budget_bytes

    def at(self, **changes: object) -> Estimate:
        """The estimate with other settings."""
        return estimate(self.target, self.draft, replace(self.settings, **changes))  # type: ignore[arg-type]

    def with_draft(self, draft: ModelFacts) -> Estimate:
        """The estimate with another draft."""
        return estimate(self.target, draft, self.settings)

    def without_draft(self) -> Estimate:
        """The estimate of the target alone."""
        return estimate(self.target, None, self.settings)

    def largest_n_ctx(self, budget_bytes: int, *, most: int | None = None) -> int | None:
        """Largest context that fits the budget, at most `most` (default: what the target was trained for).

        None where not even the smallest one, 2 tokens, does.
        """
        low, high = 2, most if most is not None else self.target.n_ctx_train
        if not self.at(n_ctx=low).fits(budget_bytes):
            return None
        while low < high:
            middle = (low + high + 1) // 2
            if self.at(n_ctx=middle).fits(budget_bytes):
                low = middle
            else:
                high = middle - 1
        return low


def band_bytes(peak_bytes: int) -> int:
    """How far above an estimate a run may come: 32 MiB, or 4 % where that is more."""
    return max(32 << 20, peak_bytes // 25)


def estimate(target: ModelFacts, draft: ModelFacts | None, settings: Settings) -> Estimate:
    """Count a run of `target`, drafted for by `draft` if there is one.

    Raises UnsupportedArchitectureError where a backend does not run a model (by name), UsageError for settings that
    contradict the models.
    """
    parts = model_parts(Owner.TARGET, settings.backend, target, settings, settings.recipe)
    backends = [settings.backend]
    if draft is not None:
        backends.append(settings.backend_of_draft)
        own = None if draft.origin is Origin.EXPORT else settings.draft_recipe or RECIPES["draft"]
        kv = settings.kv if settings.backend_of_draft == settings.backend else None
        at = replace(settings, n_ctx=min(settings.n_ctx, draft.n_ctx_train), kv=kv)
        parts += model_parts(Owner.DRAFT, settings.backend_of_draft, draft, at, own)
    return Estimate(target, draft, settings, (*parts, *process_parts(target, backends, settings)))
