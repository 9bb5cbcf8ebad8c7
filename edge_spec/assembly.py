"""What an engine is put together from, once its models are loaded: drafters, what is kept, and what is told of it."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256

from edge_spec.answer_file import AnswerFile
from edge_spec.cache_file import CacheFile
from edge_spec.decoding.drafter import Drafter, NoDrafter
from edge_spec.decoding.session import Session
from edge_spec.drafting import (
    CascadeDrafter,
    Costs,
    Growth,
    HistoryDrafter,
    LookupDrafter,
    ModelDrafter,
    PastAnswers,
    Planner,
    ReferenceDrafter,
)
from edge_spec.drafting.planner import lessons_of_texts
from edge_spec.fitting import FittedRequest
from edge_spec.generation import EngineInfo
from edge_spec.loading import KV_TYPES, engine_key, machine_key
from edge_spec.opening import MAX_DRAFT_TOKENS, LoadRequest, OpenedModels
from edge_spec.store import Store
from edge_spec.tokenizer import Tokenizer
from edge_spec.types import ModelSpec

DRAFT_TOKENS, LOOKUP_TOKENS = 3, 7
"""Lengths of drafts where no planner chooses them."""
PLANNED_TOKENS = 7


def split_parked(models: OpenedModels, parked: int) -> tuple[int, int]:
    """Of the bytes that parked chats may hold, the target's and the draft's: as their caches grow with a token."""
    target, draft = (
        one.model.spec.kv_bytes_per_token if one is not None and one.model.spec.can_park else 0
        for one in (models.target, models.draft)
    )
    of_draft = parked * draft // max(1, target + draft)
    return parked - of_draft, of_draft


def make_drafters(
    models: OpenedModels, past: PastAnswers | None, draft_tokens: int | None, *, batch: int, parked: int = 0
) -> dict[str, Drafter]:
    """Every drafter by its name; "auto" plans with all of them.

    `draft_tokens`: the longest draft of the model; `batch`: tokens of a prompt that it reads at a time; `parked`: bytes
    that it may hold of other chats.
    """
    target = models.target.model.spec
    model = None
    if models.draft is not None:
        session = Session(models.draft.model, exact=False, chunk=batch, parked_bytes=parked)
        model = ModelDrafter(session, draft_tokens=draft_tokens or DRAFT_TOKENS)
    drafters: dict[str, Drafter] = {
        "none": NoDrafter(),
        "lookup": LookupDrafter(min_match=3, max_draft=LOOKUP_TOKENS),
        "reference": ReferenceDrafter(min_match=3, max_draft=LOOKUP_TOKENS),
        "auto": _make_planner(target, model, past, draft_tokens or PLANNED_TOKENS),
    }
    if past is not None:
        drafters["history"] = HistoryDrafter(past, max_draft=LOOKUP_TOKENS)
    if model is not None:
        drafters["model"] = model
        drafters["cascade"] = CascadeDrafter(model.session, draft_tokens=draft_tokens or DRAFT_TOKENS)
    return drafters


def _make_planner(target: ModelSpec, model: ModelDrafter | None, past: PastAnswers | None, max_draft: int) -> Planner:
    def costs() -> Costs:
        draft = model.session.spec if model else None
        return Costs(
            max_rows=target.max_rows,
            alignment=target.row_alignment or 1,
            draft_share=draft.weight_bytes / target.weight_bytes if draft else 0.0,
            growth=Growth.guess(target.kv_bytes_per_token, target.weight_bytes),
            draft_growth=Growth.guess(draft.kv_bytes_per_token, draft.weight_bytes) if draft else None,
        )

    more: list[Drafter] = [ReferenceDrafter(max_draft=MAX_DRAFT_TOKENS, bold=True)]
    if past is not None:
        more.append(HistoryDrafter(past, max_draft=MAX_DRAFT_TOKENS, bold=True))
    # One matching token says little, but where rows are padded a second one costs nothing.
    lookup = LookupDrafter(min_match=1, max_draft=MAX_DRAFT_TOKENS, bold=True)
    return Planner(costs(), lookup, model, more=more, fixed=costs(), max_draft=max_draft)


def past_answers(store: Store, tokenizer: Tokenizer) -> PastAnswers:
    """The answers in this vocabulary: ids mean nothing in another one."""
    vocabulary = sha256("\0".join(tokenizer.tokens()).encode("utf-8", "surrogatepass")).hexdigest()
    return PastAnswers(AnswerFile(store.history_dir / f"{vocabulary[:16]}.ids"))


class References:
    """The callers' texts as ids; those of the last call are kept, since the next often brings them again."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._texts: tuple[str, ...] = ()
        self._ids: tuple[tuple[int, ...], ...] = ()

    def ids(self, texts: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """One sequence of ids a text; empty texts are left out."""
        if tuple(texts) != self._texts:
            self._texts = tuple(texts)
            self._ids = tuple(tuple(self._tokenizer.encode(text)) for text in texts if text)
        return self._ids


class KeptLessons:
    """What a planner learnt, of the machine and of the texts, from run to run."""

    def __init__(self, cache: CacheFile, key: str) -> None:
        self._cache = cache
        self._key = key

    @classmethod
    def of(cls, request: LoadRequest, models: OpenedModels, store: Store) -> KeptLessons:
        """The lessons about these models on this machine, on these backends."""
        draft = "no draft"
        if request.draft_source and models.draft:
            draft = f"{request.draft_source.sha256} {models.draft.stored} {engine_key(models.draft.backend)}"
        names = f"{request.source.sha256} {models.target.recipe} {models.target.stored} | {draft}"
        machine = machine_key(models.target.backend, request.threads)
        return cls(CacheFile(store.cache_dir / "costs.json"), f"{machine} | {names}")

    def restore(self, drafter: Drafter) -> None:
        """Give a planner what an earlier run learnt."""
        kept = self._cache.get(self._key)
        if isinstance(drafter, Planner) and isinstance(kept, dict):
            drafter.restore(kept)

    def keep(self, drafter: Drafter) -> None:
        """Keep what a planner has learnt, if anything."""
        if isinstance(drafter, Planner) and (known := drafter.to_json()):
            self._cache.put(self._key, known)

    def put(self, costs: Costs) -> None:
        """Keep these costs, if anything is known, in place of others; what is known of the texts stays."""
        if known := costs.to_json():
            kept = self._cache.get(self._key)
            self._cache.put(self._key, lessons_of_texts(kept) | known)


def describe(fitted: FittedRequest, models: OpenedModels, drafter: str, load_s: float) -> EngineInfo:
    """What was loaded, with what the user should know before the first text; `load_s`: seconds that it took."""
    request, target, draft = fitted.request, models.target, models.draft
    source, notes = request.source, [*request.notes, *fitted.notes]
    if source.template.source == "chatml":
        notes.append(f"{source.name} carries no chat template: ChatML stands in")
    if drafter != "none" and target.model.spec.row_alignment is None:
        reason = "no padding makes passes agree here" if request.aligns else "rows are not padded here"
        notes.append(f"{reason}: in a near tie, greedy text may differ from plain decoding's")
    if request.parked and not target.model.spec.can_park:
        notes.append(f"{source.name} cannot set a chat aside on {target.backend}: nothing of it is parked")
    usual = KV_TYPES[target.backend][0]
    if target.model.spec.kv_type != usual:
        notes.append(f"keys and values are stored as {target.model.spec.kv_type}: texts may differ from {usual}'s")
    return EngineInfo(
        target=source.name,
        draft=request.draft_source.name if request.draft_source else None,
        backend=target.backend,
        recipe=target.recipe,
        threads=request.threads,
        n_ctx=request.n_ctx,
        load_s=load_s,
        notes=[*notes, *target.notes, *(draft.notes if draft else ())],
        chat_sampling=request.chat_sampling,
        chat_system=request.chat_system,
        draft_backend=draft.backend if draft else None,
        budget_bytes=fitted.budget.held.n_bytes,
        planned_bytes=fitted.plan.required_bytes if fitted.plan else None,
        given_up=fitted.plan.given_up if fitted.plan else (),
        kv=target.model.spec.kv_type,
    )
