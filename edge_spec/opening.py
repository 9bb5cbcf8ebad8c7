"""From what the caller asks for to loaded models: find the files, settle what is open, load one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import PackageNotFoundError
from pathlib import Path

from edge_spec.backend_choice import (
    AUTO,
    NATIVE,
    BackendProfile,
    Choice,
    able_backends,
    choose_backends,
    weights_key,
)
from edge_spec.cores import RecommendedThreads, check_threads
from edge_spec.decoding.session import PREFILL_CHUNK
from edge_spec.errors import BackendUnavailableError, UsageError
from edge_spec.export.recipe import Recipe
from edge_spec.kernels.library import PORTABLE
from edge_spec.loading import (
    BACKENDS,
    LoadedModel,
    Loader,
    Source,
    StageProgress,
    check_kv_type,
    choose_n_ctx,
    chosen_draft_backend,
    chosen_recipe,
    draft_recipe,
    find_source,
    load_kernels,
    processor_key,
    running_backends,
)
from edge_spec.sizes import parse_size
from edge_spec.store import DEFAULT_PAIR, Store
from edge_spec.store.manifest import Pair
from edge_spec.tokenizer import check_same_vocabulary
from edge_spec.types import SamplingParams

DRAFTERS = ("none", "lookup", "reference", "history", "model", "cascade", "auto")
NEED_MODEL = ("model", "cascade")
"""Drafters that cannot do without a draft model."""
WITH_MODEL = ("auto", *NEED_MODEL)
"""Those that the draft model is loaded for."""
MAX_DRAFT_TOKENS = 15

NO_HISTORY = "the drafter 'history' needs one: load the engine with history=True (--history)"


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOptions:
    """What the caller of `Engine.load` asks for, as it is told there; None leaves a choice to us."""

    pair: str | None = None
    target: str | Path | None = None
    draft: str | Path | None = None
    smaller_drafts: tuple[str | Path, ...] = ()
    backend: str = AUTO
    draft_backend: str | None = None
    drafter: str = "auto"
    draft_tokens: int | None = None
    threads: int | None = None
    n_ctx: int | None = None
    recipe: str | None = None
    pad_rows: bool = True
    history: bool = False
    ram: str | int | None = None
    kv: str | None = None
    parked: str | int = 0

    def check(self) -> None:
        """Raise UsageError for what can be refused before any file is opened."""
        check_choice("backend", self.backend, (AUTO, *BACKENDS))
        check_choice("draft_backend", self.draft_backend or BACKENDS[0], BACKENDS)
        check_choice("drafter", self.drafter, DRAFTERS)
        if self.backend != AUTO:
            check_kv_type(self.kv, self.backend)
        if self.pair is not None and self.target is not None:
            raise UsageError("a pair names its target: give a pair or a target, not both")
        if self.draft_tokens is not None and not 1 <= self.draft_tokens <= MAX_DRAFT_TOKENS:
            raise UsageError(f"draft_tokens={self.draft_tokens}: from 1 to {MAX_DRAFT_TOKENS}")
        check_threads(self.threads)
        parked_bytes(self.parked)
        if self.drafter == "history" and not self.history:
            raise UsageError(NO_HISTORY)
        if not self.pad_rows and self.backend == "llama":
            raise UsageError("the llama backend never pads: leave pad_rows alone")
        if self.draft is not None and self.drafter not in WITH_MODEL:
            raise UsageError(f"the drafter {self.drafter!r} has no use for a draft model")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadRequest:
    """What will be loaded: files that were found, and every choice made."""

    source: Source
    draft_source: Source | None
    smaller_drafts: tuple[Source, ...] = ()
    """What could take the draft's place where memory is short, best first."""
    backend: str
    draft_backend: str
    threads: int
    n_ctx: int
    recipe: Recipe | None
    """How the target's weights are stored; None follows the source."""
    pad_rows: bool
    batch: int
    """Tokens of a prompt that are read at a time."""
    parked: int
    """Bytes that caches of other chats may hold, the draft's too."""
    kv: str | None
    """What keys and values are stored as, the draft's too where it runs on the same backend; None is the backend's own
    type."""
    chat_sampling: SamplingParams
    chat_system: str | None
    notes: tuple[str, ...] = ()
    """What the user should know of the choices."""

    @property
    def aligns(self) -> bool:
        """Whether the target's passes are to be padded."""
        return self.pad_rows and self.backend != "llama"

    @property
    def draft_n_ctx(self) -> int:
        """The draft's window: the target's, or its own limit if that is smaller."""
        return min(self.n_ctx, self.draft_source.n_ctx_train) if self.draft_source else 0


@dataclass(frozen=True, slots=True)
class OpenedModels:
    """What a request became. Whoever holds it closes the models."""

    target: LoadedModel
    draft: LoadedModel | None


def resolve(options: LoadOptions, store: Store, progress: StageProgress | None = None) -> LoadRequest:
    """Find the files and make the choices that were left open; loads nothing but, if they are to be used unasked, the
    native kernels.

    Raises UsageError, ModelNotFoundError, ModelFormatError, VocabMismatchError.
    """
    options.check()
    known = store.pair(options.pair or DEFAULT_PAIR) if options.target is None else None
    target, draft = named_models(options, store)
    if draft is None:
        _refuse_options_of_a_draft(options)

    source = find_source(store, target)
    draft_source = _find_draft(store, draft, source) if draft is not None else None
    smaller = _smaller_drafts(options, known, draft, store)
    chosen = _choose_backends(options, store, source, draft_source, progress)
    threads = options.threads or chosen.threads or _recommended_threads(store, chosen.backend)
    return LoadRequest(
        source=source,
        draft_source=draft_source,
        smaller_drafts=tuple(_find_draft(store, name, source) for name in smaller),
        backend=chosen.backend,
        draft_backend=chosen.draft_backend,
        threads=check_threads(threads),
        n_ctx=choose_n_ctx(source, options.n_ctx),
        recipe=chosen_recipe(options.recipe, chosen.backend, source),
        pad_rows=options.pad_rows,
        batch=PREFILL_CHUNK,
        parked=parked_bytes(options.parked),
        kv=options.kv,
        chat_sampling=known.sampling if known else SamplingParams(),
        chat_system=known.system if known else None,
        notes=chosen.notes,
    )


def _find_draft(store: Store, ref: str | Path, target: Source) -> Source:
    """A draft of the target's vocabulary. VocabMismatchError for another."""
    found = find_source(store, ref, share=target.tokenizer)
    check_same_vocabulary(target.tokenizer, found.tokenizer)
    return found


def _smaller_drafts(
    options: LoadOptions, pair: Pair | None, draft: str | Path | None, store: Store
) -> tuple[str | Path, ...]:
    """What may stand in for the draft: what was asked for, else what the pair's manifest names and is here."""
    if options.smaller_drafts and draft is None:
        raise UsageError("smaller_drafts stand in for a draft model, and none is used")
    if options.smaller_drafts or pair is None or draft != pair.draft:
        return options.smaller_drafts
    return tuple(name for name in pair.smaller_drafts if store.has(name))


def named_models(options: LoadOptions, store: Store) -> tuple[str | Path, str | Path | None]:
    """How the target and the draft are named that the options ask for."""
    if options.target is not None:
        return options.target, options.draft
    pair = store.pair(options.pair or DEFAULT_PAIR)
    use_own = options.draft is None and options.drafter in WITH_MODEL
    return pair.target, pair.draft if use_own else options.draft


def _choose_backends(
    options: LoadOptions, store: Store, source: Source, draft_source: Source | None, progress: StageProgress | None
) -> Choice:
    """As the options say; where they leave it open, what was found fastest on this machine and can be had."""
    if options.backend != AUTO:
        return Choice(options.backend, chosen_draft_backend(options.draft_backend, options.backend))
    recipe = chosen_recipe(options.recipe, AUTO, source)
    able = able_backends(running_backends(source), recipe=recipe, kv=options.kv, pad_rows=options.pad_rows)
    profile = BackendProfile(store.cache_dir)
    target = profile.get(profile_key(source, recipe))
    draft = profile.get(profile_key(draft_source, draft_recipe(draft_source))) if draft_source else None
    choose = partial(choose_backends, draft_backend=options.draft_backend, plain=options.drafter == "none")
    chosen = choose(able, target, draft)
    refusal = _refusal_of_kernels(store, progress) if NATIVE in (chosen.backend, chosen.draft_backend) else None
    if refusal is None:
        return chosen
    others = [name for name in able if name != NATIVE]
    drafting = {name: times for name, times in draft.items() if name != NATIVE} if draft else draft
    chosen = choose(others, target, drafting)
    return replace(chosen, notes=(refusal, *chosen.notes))


def _refusal_of_kernels(store: Store, progress: StageProgress | None) -> str | None:
    """Why the native backend is not taken unasked; None if it can be, with its kernels ready."""
    try:
        if load_kernels(store, progress) == PORTABLE:
            return "the native backend's kernels know none of this processor's instructions"
    except BackendUnavailableError as exc:
        return str(exc)
    return None


def profile_key(source: Source, recipe: Recipe | None) -> str:
    """What a source is in the profile of backends, exported with `recipe` if it is a GGUF."""
    return weights_key(source.sha256, source.export.recipe if source.export else recipe)


def _recommended_threads(store: Store, backend: str) -> int | None:
    """What `edge-spec doctor` found best here; None where it was not asked, or the backend is not installed."""
    try:
        key = processor_key(backend)
    except (PackageNotFoundError, BackendUnavailableError):
        return None
    return RecommendedThreads(store.cache_dir).get(key)


def open_models(request: LoadRequest, store: Store, progress: StageProgress | None = None) -> OpenedModels:
    """Load the target, then the draft; a failure leaves nothing open. Raises what `Engine.load` raises."""
    loader = Loader(
        store=store,
        backend=request.backend,
        threads=request.threads,
        kv=request.kv,
        park_bytes=request.parked,
        progress=progress,
    )
    with ExitStack() as opened:
        target = loader.load(request.source, n_ctx=request.n_ctx, recipe=request.recipe, aligned=request.pad_rows)
        opened.callback(target.model.close)
        draft = None
        if request.draft_source is not None:
            kv = request.kv if request.draft_backend == request.backend else None
            draft = replace(loader, backend=request.draft_backend, kv=kv).load(
                request.draft_source,
                n_ctx=request.draft_n_ctx,
                recipe=draft_recipe(request.draft_source),
                aligned=False,
            )
            opened.callback(draft.model.close)
        opened.pop_all()
    return OpenedModels(target, draft)


def parked_bytes(parked: str | int) -> int:
    """Bytes of a size like "256MiB", or as they are; UsageError for what is neither."""
    if isinstance(parked, str):
        return parse_size(parked)
    if isinstance(parked, bool) or not isinstance(parked, int) or parked < 0:
        raise UsageError(f"parked={parked!r}: give a size like '256MiB', or a number of bytes")
    return parked


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """UsageError unless `value` is one of `choices`."""
    if value not in choices:
        raise UsageError(f"{name}={value!r}: choose one of {', '.join(choices)}")


def _refuse_options_of_a_draft(options: LoadOptions) -> None:
    if options.drafter in NEED_MODEL:
        raise UsageError(f"the drafter {options.drafter!r} needs a draft model: name one, or use 'lookup'")
    for name in ("draft_tokens", "draft_backend"):
        if getattr(options, name) is not None:
            raise UsageError(f"{name} is for the draft model, and no draft model is used")
