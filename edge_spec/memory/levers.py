"""What could be changed so that a run takes less memory, and how much each change saves."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from edge_spec.errors import EdgeSpecError
from edge_spec.export.recipe import RECIPES, default_recipe
from edge_spec.memory.estimate import Estimate, estimate
from edge_spec.memory.facts import Origin
from edge_spec.memory.kv import KV_TYPES, find_kv_type
from edge_spec.memory.parts import BACKENDS

LEAST_SAVED_BYTES = 1 << 20
_SMALL_BATCH = 32


@dataclass(frozen=True)
class Lever:
    """One change: what it is, the option that makes it, and the estimate that it leads to."""

    name: str
    option: str
    saved_bytes: int
    outcome: Estimate


def find_levers(counted: Estimate) -> list[Lever]:
    """Single changes that save at least a MiB of the peak, the largest first."""
    levers = []
    for name, option, outcome in _changes(counted):
        saved = counted.peak_bytes - outcome.peak_bytes
        if saved >= LEAST_SAVED_BYTES:
            levers.append(Lever(name, option, saved, outcome))
    return sorted(levers, key=lambda lever: -lever.saved_bytes)


def _changes(counted: Estimate) -> Iterator[tuple[str, str, Estimate]]:
    settings, target = counted.settings, counted.target
    if counted.draft is not None:
        yield "no draft model", "--drafter lookup", counted.without_draft()
    if settings.n_ctx >= 1024:
        half = settings.n_ctx // 2
        yield f"a context of {half} tokens", f"--ctx {half}", counted.at(n_ctx=half)
    kv = find_kv_type(settings.kv, settings.backend)
    for kind in KV_TYPES[settings.backend]:
        if kind.bytes_per_element < kv.bytes_per_element:
            yield f"cache elements of type {kind.name}", f"--kv {kind.name}", counted.at(kv=kind.name)
    if target.origin is not Origin.EXPORT and settings.backend != "llama":
        recipe = settings.recipe or default_recipe(target)
        if recipe.bits == 8:
            yield "weights of 4 bits", "--recipe int4", counted.at(recipe=RECIPES["int4"])
    if settings.batch > _SMALL_BATCH:
        yield f"passes of {_SMALL_BATCH} tokens", f"--batch {_SMALL_BATCH}", counted.at(batch=_SMALL_BATCH)
    if settings.parked:
        yield "no parked chats", "without --parked", counted.at(parked=0)
    if settings.history:
        yield "no past answers", "without --history", counted.at(history=False)
    for backend in BACKENDS:
        if backend == settings.backend or (backend == "llama" and not target.runs_on_llama):
            continue
        try:
            other = replace(settings, backend=backend, draft_backend=None, kv=None, recipe=None)
            yield f"the {backend} backend", f"--backend {backend}", estimate(target, counted.draft, other)
        except EdgeSpecError:  # it does not run these models
            continue
