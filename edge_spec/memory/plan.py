"""From a budget to what will be loaded: the least is given up that makes it fit, and it is said what.

What fits as it was asked for is loaded as it was asked for. Else go, in this order: the room for parked chats, long
passes over prompts, the cache's precision where the backend offers less, half of a window that nobody asked for, the
draft for a smaller one where one is known, the draft, and then as much of that window as it takes. What the caller
chose of the models is kept: where that does not fit, nothing is loaded, and the error says what would fit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from edge_spec.errors import MemoryBudgetError
from edge_spec.memory.budget import Bound, Budget, Counts
from edge_spec.memory.estimate import Estimate
from edge_spec.memory.facts import ModelFacts
from edge_spec.memory.parts import Owner
from edge_spec.sizes import format_size

SHORT_PASS = 32
"""Tokens of a prompt that are read at a time where memory is short: little slower than 128."""
LEAST_N_CTX, N_CTX_STEP = 64, 64
"""A shorter window leaves no room for an answer; windows that are chosen here are multiples of the step."""
OWN_NOISE_BYTES = 8 << 20
"""How far the process's own parts may be off before what is more belongs to others: the band has room for it."""


@dataclass(frozen=True, slots=True)
class Freedom:
    """What may be given up of what was wanted: all that the caller did not choose."""

    n_ctx: bool = True
    draft: bool = True
    kv: tuple[str, ...] = ()
    """Smaller types of cache elements that the backend offers, best first."""
    drafts: tuple[ModelFacts, ...] = ()
    """Smaller drafts that could take the draft's place, best first."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What will be loaded, and what was given up for it, as the user would say it."""

    estimate: Estimate
    budget: Budget
    given_up: tuple[str, ...] = ()

    @property
    def required_bytes(self) -> int:
        """Most anonymous memory that the run is expected to hold, the band included."""
        return required_bytes(self.estimate)


def make_plan(wanted: Estimate, budget: Budget, freedom: Freedom, *, held_bytes: int = 0) -> Plan:
    """The plan that gives up least of `wanted` and fits every bound of `budget`.

    `held_bytes`: anonymous memory of the process before anything is loaded; what is in it beside the parts that the
    estimate counts belongs to the program around, and counts too. Raises MemoryBudgetError.
    """
    fit = _Fit(budget, foreign_bytes(wanted, held_bytes))
    for candidate, given_up in _candidates(wanted, freedom, fit):
        if fit(candidate):
            return Plan(candidate, budget, given_up)
    raise _refusal(wanted, freedom, fit)


def foreign_bytes(wanted: Estimate, held_bytes: int) -> int:
    """What the process holds for others: all but the interpreter, the tokenizer and the libraries of this run."""
    parts = (part for part in wanted.components if part.owner is Owner.PROCESS and not part.filled_later)
    own = sum(part.committed_bytes for part in parts)
    return held_bytes - own if held_bytes - own > OWN_NOISE_BYTES else 0


def required_bytes(estimate: Estimate, counts: Counts = Counts.HELD) -> int:
    """What a run needs at the upper end of the estimate's band, by one way of counting."""
    required = estimate.peak_bytes + estimate.band_bytes
    if counts is not Counts.HELD:
        required += estimate.reserved_bytes
    if counts is Counts.MAPPED:
        required += sum(part.mapped_bytes for part in estimate.components)
    return required


class _Fit:
    """Whether an estimate stays within every bound, beside what the process holds for others."""

    def __init__(self, budget: Budget, foreign: int) -> None:
        self._budget = budget
        self._foreign = foreign

    def __call__(self, estimate: Estimate) -> bool:
        required, bound = self.tightest(estimate)
        return required <= bound.n_bytes

    def tightest(self, estimate: Estimate) -> tuple[int, Bound]:
        """The bound that leaves least to the estimate, and the bytes that this needs by it."""
        needed = [(required_bytes(estimate, bound.counts) + self._foreign, bound) for bound in self._budget.bounds]
        return max(needed, key=lambda need: need[0] - need[1].n_bytes)

    def largest_n_ctx(self, estimate: Estimate) -> int:
        """Longest window, up to the estimate's own, that fits: that one or a multiple of the step; 0 for none."""
        most = estimate.settings.n_ctx
        if self(estimate):
            return most
        low, high = 0, (most - 1) // N_CTX_STEP
        while low < high:
            middle = (low + high + 1) // 2
            if self(estimate.at(n_ctx=middle * N_CTX_STEP)):
                low = middle
            else:
                high = middle - 1
        return low * N_CTX_STEP


Choice = tuple[Estimate, tuple[str, ...]]
"""What could be loaded, and what is given up for it."""


def _candidates(wanted: Estimate, freedom: Freedom, fit: _Fit) -> Iterator[Choice]:
    """What could be loaded, what gives up least first. Not all of it fits."""
    given_up: tuple[str, ...] = ()
    if wanted.settings.parked:
        yield wanted, ()
        wanted, given_up = wanted.at(parked=0), ("no room for parked chats",)
    if wanted.draft is None:
        yield from _smaller(wanted, given_up, freedom, fit, LEAST_N_CTX)
        return
    drafted: list[Choice] = [(wanted, given_up)]
    drafted += [
        (
            wanted.with_draft(other),
            (
                *given_up,
                f"the draft {other.name} instead of {wanted.draft.name}",
            ),
        )
        for other in freedom.drafts
    ]
    for choice in drafted:
        yield from _smaller(*choice, freedom, fit, wanted.settings.n_ctx // 2)
    last = (wanted.without_draft(), (*given_up, "no draft model")) if freedom.draft else drafted[-1]
    yield from _smaller(*last, freedom, fit, LEAST_N_CTX)


def _smaller(
    estimate: Estimate, given_up: tuple[str, ...], freedom: Freedom, fit: _Fit, least_n_ctx: int
) -> Iterator[Choice]:
    """The same models with less and less around them, down to a window of `least_n_ctx` tokens."""
    yield estimate, given_up
    settings = estimate.settings
    if settings.batch > SHORT_PASS:
        estimate, given_up = estimate.at(batch=SHORT_PASS), (*given_up, f"prompts read {SHORT_PASS} tokens at a time")
        yield estimate, given_up
    for kv in freedom.kv:
        estimate = estimate.at(kv=kv)
        yield estimate, (*given_up, f"a cache in {kv}")
    if freedom.kv:
        given_up = (*given_up, f"a cache in {freedom.kv[-1]}")
    if freedom.n_ctx and (n_ctx := fit.largest_n_ctx(estimate)) >= least_n_ctx:
        yield estimate.at(n_ctx=n_ctx), (*given_up, f"a window of {n_ctx} tokens instead of {settings.n_ctx}")


def _refusal(wanted: Estimate, freedom: Freedom, fit: _Fit) -> MemoryBudgetError:
    """What is missing, and the cheapest change that would fit."""
    required, bound = fit.tightest(wanted)
    least = _least(wanted, freedom)
    alone = least.without_draft()
    n_ctx, n_ctx_alone = fit.largest_n_ctx(least), fit.largest_n_ctx(alone)
    changes = []
    if n_ctx >= LEAST_N_CTX:
        changes.append(f"--ctx {n_ctx} (n_ctx={n_ctx})")
    if wanted.draft is not None and n_ctx_alone == wanted.settings.n_ctx:
        changes.append("no draft model (--drafter lookup)")
    elif wanted.draft is not None and n_ctx_alone > n_ctx:
        without = " without a draft model (--drafter lookup)"
        changes.append(f"--ctx {n_ctx_alone} (n_ctx={n_ctx_alone}){without if not freedom.draft else ''}")
    if changes:
        remedy = f"what fits: {', or '.join(changes)}"
    else:
        smallest = format_size(fit.tightest(alone.at(n_ctx=LEAST_N_CTX))[0])
        remedy = f"even alone and with a window of {LEAST_N_CTX} tokens the target needs {smallest}: take a smaller one"
    return MemoryBudgetError(
        required,
        bound.n_bytes,
        n_ctx if n_ctx >= LEAST_N_CTX else n_ctx_alone if n_ctx_alone >= LEAST_N_CTX else 0,
        f"{_named(wanted)} needs {format_size(required)} and may hold {bound}, {format_size(required - bound.n_bytes)} "
        f"less; {remedy}",
    )


def _least(wanted: Estimate, freedom: Freedom) -> Estimate:
    """As wanted, with all around the models as small as it goes."""
    settings = wanted.settings
    if wanted.draft is not None and freedom.drafts:
        wanted = wanted.with_draft(freedom.drafts[-1])
    return wanted.at(parked=0, batch=min(SHORT_PASS, settings.batch), kv=freedom.kv[-1] if freedom.kv else settings.kv)


def _named(wanted: Estimate) -> str:
    draft = f" with the draft {wanted.draft.name}" if wanted.draft else ""
    return f"{wanted.target.name}{draft} and a window of {wanted.settings.n_ctx} tokens"
