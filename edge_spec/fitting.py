"""Makes a request fit the memory that there is, before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from edge_spec.errors import UnsupportedArchitectureError
from edge_spec.loading import Source
from edge_spec.memory import ModelFacts, Settings, estimate, facts_of_export, facts_of_gguf
from edge_spec.memory.budget import Budget, find_budget
from edge_spec.memory.kv import SUPPORTED_KV
from edge_spec.memory.plan import Freedom, Plan, make_plan
from edge_spec.memory.process import process_memory
from edge_spec.opening import NEED_MODEL, LoadOptions, LoadRequest
from edge_spec.sizes import format_size

SMALLER_KV = ("q8_0",)
"""What keys and values may be stored as on llama.cpp where memory is short."""


@dataclass(frozen=True, slots=True)
class FittedRequest:
    """A request that fits its budget. `plan` is None where the model's memory cannot be told beforehand."""

    request: LoadRequest
    budget: Budget
    plan: Plan | None
    notes: tuple[str, ...] = ()


def fit(request: LoadRequest, options: LoadOptions) -> FittedRequest:
    """Plan the request within `options.ram`, or within what the machine leaves.

    Raises MemoryBudgetError where nothing fits that the caller would recognise, UsageError for a `ram` that is none,
    and UnsupportedArchitectureError where `ram` was asked for and the model's memory is not known.
    """
    usage = process_memory().read()
    budget = find_budget(options.ram, usage=usage)
    try:
        target, draft = _facts(request.source), _facts(request.draft_source) if request.draft_source else None
        smaller = {_facts(source): source for source in request.smaller_drafts}
        wanted = estimate(target, draft, _settings(request, options, target))
    except UnsupportedArchitectureError as exc:
        if options.ram is not None:
            raise
        # The backend may still run it, and says so if it does not.
        return FittedRequest(request, budget, None, (f"memory was not planned: {exc}",))
    freedom = Freedom(
        n_ctx=options.n_ctx is None,
        draft=options.drafter not in NEED_MODEL,
        # Only where no text is promised to be the same to the bit, and the type costs nothing to prepare.
        kv=SMALLER_KV if options.kv is None and request.backend == "llama" else (),
        drafts=tuple(smaller),
    )
    plan = make_plan(wanted, budget, freedom, held_bytes=usage.anonymous_bytes)
    settings = plan.estimate.settings
    fitted = replace(
        request,
        n_ctx=settings.n_ctx,
        batch=settings.batch,
        parked=settings.parked,
        kv=settings.kv if settings.kv in freedom.kv else request.kv,
        draft_source=_drafting(plan, request, smaller),
    )
    notes = [f"memory: within {budget.held} there is {_listed(plan.given_up)}"] if plan.given_up else []
    room = find_budget(usage=usage).held
    if (read_bytes := plan.estimate.working_set_bytes) > room.n_bytes:
        notes.append(
            f"memory: every token reads {format_size(read_bytes)}, and {room} stay in memory: the rest comes from the "
            f"disk each time"
        )
    return FittedRequest(fitted, budget, plan, tuple(notes))


def _drafting(plan: Plan, request: LoadRequest, smaller: Mapping[ModelFacts, Source]) -> Source | None:
    """The draft that a plan keeps: the one that was asked for, a smaller one, or none."""
    if plan.estimate.draft is None:
        return None
    return smaller.get(plan.estimate.draft, request.draft_source)


def _facts(source: Source) -> ModelFacts:
    if source.export is not None:
        return facts_of_export(source.export.path, name=source.name)
    return facts_of_gguf(source.gguf, name=source.name, sha256=source.sha256)


def _settings(request: LoadRequest, options: LoadOptions, target: ModelFacts) -> Settings:
    # What the exporter refuses goes to llama.cpp (`loading.Loader`).
    backend = request.backend if target.config is not None else "llama"
    return Settings(
        backend=backend,
        draft_backend=request.draft_backend if request.draft_source else None,
        n_ctx=request.n_ctx,
        # A type that cannot be counted is smaller than the backend's own, which then stands for it.
        kv=request.kv if request.kv in SUPPORTED_KV[backend] else None,
        batch=request.batch,
        threads=request.threads,
        recipe=request.recipe if backend != "llama" else None,
        history=options.history,
        parked=request.parked,
    )


def _listed(parts: tuple[str, ...]) -> str:
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)
