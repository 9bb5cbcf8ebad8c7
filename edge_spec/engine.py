"""The engine: a target and perhaps a draft, loaded once, that write text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from time import perf_counter
from types import TracebackType

from edge_spec.answer_file import AnswerFile
from edge_spec.cache_file import CacheFile
from edge_spec.conversation import Chat
from edge_spec.cores import check_threads
from edge_spec.decoding.decoder import SpeculativeDecoder
from edge_spec.decoding.drafter import Drafter, NoDrafter
from edge_spec.decoding.session import Session
from edge_spec.drafting import (
    Costs,
    HistoryDrafter,
    LookupDrafter,
    ModelDrafter,
    PastAnswers,
    Planner,
    ReferenceDrafter,
)
from edge_spec.errors import UsageError
from edge_spec.generation import EngineInfo, Stream, make_result
from edge_spec.loading import (
    BACKENDS,
    LoadedModel,
    Loader,
    Source,
    StageProgress,
    choose_n_ctx,
    chosen_draft_backend,
    chosen_recipe,
    draft_recipe,
    engine_key,
    find_source,
    machine_key,
)
from edge_spec.store import DEFAULT_PAIR, Store
from edge_spec.tokenizer import Tokenizer, check_same_vocabulary
from edge_spec.types import GenerationResult, ModelSpec, Progress, SamplingParams

DRAFTERS = ("none", "lookup", "reference", "history", "model", "auto")
COPYING = ("reference", "auto")
"""Those that copy from references."""

_NO_HISTORY = "the drafter 'history' needs one: load the engine with history=True (--history)"

DRAFT_TOKENS, LOOKUP_TOKENS = 3, 7
"""Lengths of drafts where no planner chooses them."""
PLANNED_TOKENS, MAX_DRAFT_TOKENS = 7, 15


class Engine:
    """A loaded target, its draft and their caches. Made by `load`; a context manager; for one generation at a time."""

    def __init__(
        self,
        info: EngineInfo,
        source: Source,
        target: Session,
        drafters: dict[str, Drafter],
        kept: _KeptCosts,
        *,
        default: str,
        past: PastAnswers | None = None,
    ) -> None:
        self.info = info
        self._source = source
        self._target = target
        self._drafters = drafters
        self._default = default
        self._past = past
        self._references = _References(source.tokenizer)
        self._kept = kept
        kept.restore(drafters["auto"])

    @classmethod
    def load(
        cls,
        pair: str | None = None,
        *,
        target: str | Path | None = None,
        draft: str | Path | None = None,
        backend: str = "onnx",
        draft_backend: str | None = None,
        drafter: str = "auto",
        draft_tokens: int | None = None,
        threads: int | None = None,
        n_ctx: int | None = None,
        recipe: str | None = None,
        pad_rows: bool = True,
        history: bool = False,
        on_progress: StageProgress | None = None,
    ) -> Engine:
        """Load a pair by its name (default: qwen2.5-coder), or `target` and, if wanted, `draft`.

        Models are names, hub references that were pulled, paths of GGUF files or of exports. The first load of a GGUF
        on the onnx or openvino backend exports it into the store.

        `draft_backend` defaults to `backend`, and to onnx where that is openvino.

        `drafter` is what generations use unless told otherwise: "auto" (text that repeats, else the draft model),
        "lookup", "reference" (texts that come with each prompt), "history", "model" or "none"; the draft is loaded for
        "auto" and "model". `draft_tokens` is the longest draft of the model. `threads` defaults to the physical cores,
        `n_ctx` to 4,096 tokens or the model's own limit. `recipe` (of the target) defaults to 4 bits, or 8 where the
        source has more than 6. `pad_rows=False` gives up bit-for-bit equality between drafters at temperature 0 for a
        little speed of plain decoding.

        `history` keeps the ids of every answer in a file of at most 4 MiB that only this user may read, and lets
        "auto" and "history" copy from it: `edge-spec history` shows and clears it.

        Raises ModelNotFoundError (with the command that fetches it), VocabMismatchError, BackendUnavailableError,
        UnsupportedArchitectureError, ModelFormatError, UsageError, StorageError.
        """
        started = perf_counter()
        _check_choice("backend", backend, BACKENDS)
        _check_choice("draft_backend", draft_backend or backend, BACKENDS)
        _check_choice("drafter", drafter, DRAFTERS)
        if pair is not None and target is not None:
            raise UsageError("a pair names its target: give a pair or a target, not both")
        if draft_tokens is not None and not 1 <= draft_tokens <= MAX_DRAFT_TOKENS:
            raise UsageError(f"draft_tokens={draft_tokens}: from 1 to {MAX_DRAFT_TOKENS}")
        threads = check_threads(threads)
        if drafter == "history" and not history:
            raise UsageError(_NO_HISTORY)
        if not pad_rows and backend == "llama":
            raise UsageError("the llama backend never pads: leave pad_rows alone")

        store = Store()
        known = store.pair(pair or DEFAULT_PAIR) if target is None else None
        wants_draft = drafter in ("auto", "model")
        if draft is not None and not wants_draft:
            raise UsageError(f"the drafter {drafter!r} has no use for a draft model")
        if known is not None and draft is None and wants_draft:
            draft = known.draft
        if drafter == "model" and draft is None:
            raise UsageError("the drafter 'model' needs a draft model: name one, or use 'lookup'")

        if draft_tokens is not None and draft is None:
            raise UsageError("draft_tokens is for the draft model, and no draft model is used")
        if draft_backend is not None and draft is None:
            raise UsageError("draft_backend is for the draft model, and no draft model is used")

        source = find_source(store, known.target if known else target or "")
        draft_source = find_source(store, draft, share=source.tokenizer) if draft is not None else None
        if draft_source is not None:
            check_same_vocabulary(source.tokenizer, draft_source.tokenizer)
        window = choose_n_ctx(source, n_ctx)
        loader = Loader(store=store, backend=backend, threads=threads, progress=on_progress)

        chosen = chosen_recipe(recipe, backend, source)
        with ExitStack() as opened:
            loaded = loader.load(source, n_ctx=window, recipe=chosen, aligned=pad_rows)
            opened.callback(loaded.model.close)
            notes, model, drafting = [*_notes_on(source, loaded, drafter), *loaded.notes], None, None
            if draft_source is not None:
                drafting = replace(loader, backend=chosen_draft_backend(draft_backend, backend)).load(
                    draft_source,
                    n_ctx=min(window, draft_source.n_ctx_train),
                    recipe=draft_recipe(draft_source),
                    aligned=False,
                )
                opened.callback(drafting.model.close)
                notes += drafting.notes
                model = ModelDrafter(Session(drafting.model), draft_tokens=draft_tokens or DRAFT_TOKENS)
            opened.pop_all()
        past = _past_answers(store, source.tokenizer) if history else None
        drafters = _make_drafters(loaded.model.spec, model, past, draft_tokens or PLANNED_TOKENS)
        info = EngineInfo(
            target=source.name,
            draft=draft_source.name if draft_source else None,
            backend=loaded.backend,
            recipe=loaded.recipe,
            threads=threads,
            n_ctx=window,
            load_s=perf_counter() - started,
            notes=notes,
            chat_sampling=known.sampling if known else SamplingParams(),
            chat_system=known.system if known else None,
            draft_backend=drafting.backend if drafting else None,
        )
        names = f"{source.sha256} {loaded.recipe} | {_drafted_by(draft_source, drafting)}"
        machine = machine_key(loaded.backend, threads)
        costs = _KeptCosts(CacheFile(store.cache_dir / "costs.json"), f"{machine} | {names}")
        return cls(info, source, Session(loaded.model), drafters, costs, default=drafter, past=past)

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def stream(
        self,
        prompt: str,
        *,
        system: str | None = None,
        raw: bool = False,
        max_tokens: int | None = None,
        sampling: SamplingParams | None = None,
        stop: Sequence[str] = (),
        drafter: str | None = None,
        reference: Sequence[str] = (),
        on_progress: Progress | None = None,
    ) -> Stream:
        """Answer `prompt`; text comes as it is written.

        The prompt is a user's message, after `system` if given, in the model's chat template; with `raw` it is the
        text to continue. Ends at the end of the turn, a `stop` string, `max_tokens` or a full window. `sampling`
        defaults to greedy. `reference`: texts that the answer is likely to copy from (a file to edit, what was
        retrieved), whether or not the prompt holds them; they change its speed only. `on_progress(read, to_read)` is
        called while the prompt is read; False cancels.
        Raises UsageError and ContextLengthError at the call.
        """
        if raw and system is not None:
            raise UsageError("a raw prompt has no place for a system message")
        if raw:
            tokenizer = self._source.tokenizer
            prompt_ids = tokenizer.encode(prompt, add_bos=tokenizer.add_bos)
        else:
            messages = [{"role": "system", "content": system}] if system is not None else []
            messages.append({"role": "user", "content": prompt})
            prompt_ids = self._source.template.render_ids(messages, self._source.tokenizer)
        return self._stream_ids(
            prompt_ids,
            max_tokens=max_tokens,
            sampling=sampling,
            stop=stop,
            drafter=drafter,
            reference=reference,
            on_progress=on_progress,
        )

    def generate(
        self,
        prompt: str,
        *,
        system: str | None = None,
        raw: bool = False,
        max_tokens: int | None = None,
        sampling: SamplingParams | None = None,
        stop: Sequence[str] = (),
        drafter: str | None = None,
        reference: Sequence[str] = (),
        on_progress: Progress | None = None,
    ) -> GenerationResult:
        """`stream`, read to its end."""
        stream = self.stream(
            prompt,
            system=system,
            raw=raw,
            max_tokens=max_tokens,
            sampling=sampling,
            stop=stop,
            drafter=drafter,
            reference=reference,
            on_progress=on_progress,
        )
        for _ in stream:
            pass
        return stream.result

    def chat(self, *, system: str | None = None) -> Chat:
        """A conversation; `system` defaults to the pair's own, then to the template's."""
        system = system if system is not None else self.info.chat_system
        return Chat(self._stream_ids, self._source.template, self._source.tokenizer, system=system)

    def count(self, text: str) -> int:
        """Tokens of `text`, as plain text."""
        return len(self._source.tokenizer.encode(text))

    def reset(self) -> None:
        """Forget what the caches hold, so that the next prompt is read from its first token."""
        for session in self._sessions():
            session.forget()

    def unpadded(self) -> AbstractContextManager[None]:
        """Within the block the target's passes are not padded, as with `pad_rows=False`.

        That is what plain decoding costs where nothing has to be equal to it. The target's cache is forgotten at both
        ends. Nothing changes where passes are not padded anyway.
        """
        return self._target.unpadded()

    def close(self) -> None:
        """Keep what was learnt of the machine and give the memory back. Closing twice is not an error."""
        self._kept.keep(self._drafters["auto"])
        for session in self._sessions():
            session.close()

    def _sessions(self) -> list[Session]:
        model = self._drafters.get("model")
        return [self._target, model.session] if isinstance(model, ModelDrafter) else [self._target]

    def _stream_ids(
        self,
        prompt_ids: list[int],
        *,
        max_tokens: int | None,
        sampling: SamplingParams | None,
        stop: Sequence[str],
        on_progress: Progress | None,
        drafter: str | None = None,
        reference: Sequence[str] = (),
        done: Callable[[GenerationResult], None] | None = None,
    ) -> Stream:
        tokenizer, info = self._source.tokenizer, self.info
        decoder = SpeculativeDecoder(self._target, self._choose_drafter(drafter, reference))
        references = self._references.ids(reference)
        refused = self._target.num_refused_rollbacks

        def finish(stream: Stream) -> GenerationResult:
            result = make_result(stream, prompt_tokens=len(prompt_ids), info=info)
            if self._target.num_refused_rollbacks > refused:
                result.notes.append("the backend could not drop tokens from its cache, so the context was read again")
            self._remember(result)
            if done is not None:
                done(result)
            return result

        return Stream(
            lambda cancelled: decoder.generate(
                prompt_ids,
                sampling=sampling,
                max_tokens=max_tokens,
                stop_ids=tokenizer.stop_ids,
                references=references,
                cancelled=cancelled,
                on_progress=on_progress,
            ),
            decoder,
            tokenizer.stream(previous=prompt_ids[-1] if prompt_ids else None),
            stop,
            finish,
        )

    def _remember(self, result: GenerationResult) -> None:
        if self._past is not None:
            self._past.add(result.token_ids)
            result.notes.extend(self._past.take_problems())

    def _choose_drafter(self, name: str | None, reference: Sequence[str]) -> Drafter:
        name = name or self._default
        _check_choice("drafter", name, DRAFTERS)
        if isinstance(reference, str) or not all(isinstance(text, str) for text in reference):
            raise UsageError("reference is a list of texts")
        if reference and name not in COPYING:
            raise UsageError(f"the drafter {name!r} copies from no reference: use {' or '.join(COPYING)}")
        if name == "reference" and not reference:
            raise UsageError("the drafter 'reference' needs texts to copy from: give it reference=[...]")
        if name == "history" and name not in self._drafters:
            raise UsageError(_NO_HISTORY)
        if name == "model" and name not in self._drafters:
            raise UsageError("no draft model was loaded: load the engine with a draft, or use 'lookup'")
        return self._drafters[name]


class _References:
    """The callers' texts as ids; those of the last call are kept, since the next often brings them again."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._texts: tuple[str, ...] = ()
        self._ids: tuple[tuple[int, ...], ...] = ()

    def ids(self, texts: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        if tuple(texts) != self._texts:
            self._texts = tuple(texts)
            self._ids = tuple(tuple(self._tokenizer.encode(text)) for text in texts if text)
        return self._ids


class _KeptCosts:
    """What a planner learnt of the machine, from run to run."""

    def __init__(self, cache: CacheFile, key: str) -> None:
        self._cache = cache
        self._key = key

    def restore(self, drafter: Drafter) -> None:
        kept = self._cache.get(self._key)
        if isinstance(drafter, Planner) and isinstance(kept, dict):
            drafter.costs.restore(kept)

    def keep(self, drafter: Drafter) -> None:
        if isinstance(drafter, Planner) and (learnt := drafter.costs.to_json()):
            self._cache.put(self._key, learnt)


def _past_answers(store: Store, tokenizer: Tokenizer) -> PastAnswers:
    """The answers in this vocabulary: ids mean nothing in another one."""
    vocabulary = sha256("\0".join(tokenizer.tokens()).encode("utf-8", "surrogatepass")).hexdigest()
    return PastAnswers(AnswerFile(store.history_dir / f"{vocabulary[:16]}.ids"))


def _make_drafters(
    target: ModelSpec, model: ModelDrafter | None, past: PastAnswers | None, planned_tokens: int
) -> dict[str, Drafter]:
    """Every drafter by its name; "auto" plans with all of them."""

    def costs() -> Costs:
        share = model.session.spec.weight_bytes / target.weight_bytes if model else 0.0
        return Costs(max_rows=target.max_rows, alignment=target.row_alignment or 1, draft_share=share)

    more: list[Drafter] = [ReferenceDrafter(max_draft=MAX_DRAFT_TOKENS, bold=True)]
    if past is not None:
        more.append(HistoryDrafter(past, max_draft=MAX_DRAFT_TOKENS, bold=True))
    planner = Planner(
        costs(),
        LookupDrafter(max_draft=MAX_DRAFT_TOKENS, bold=True),
        model,
        more=more,
        fixed=costs(),
        max_draft=planned_tokens,
    )
    drafters: dict[str, Drafter] = {
        "none": NoDrafter(),
        "lookup": LookupDrafter(min_match=3, max_draft=LOOKUP_TOKENS),
        "reference": ReferenceDrafter(min_match=3, max_draft=LOOKUP_TOKENS),
        "auto": planner,
    }
    if past is not None:
        drafters["history"] = HistoryDrafter(past, max_draft=LOOKUP_TOKENS)
    if model is not None:
        drafters["model"] = model
    return drafters


def _drafted_by(source: Source | None, loaded: LoadedModel | None) -> str:
    """What the cost of a draft token depends on besides the machine."""
    return f"{source.sha256} {engine_key(loaded.backend)}" if source and loaded else "no draft"


def _notes_on(source: Source, loaded: LoadedModel, drafter: str) -> list[str]:
    """What the user should know of a target before its first text."""
    notes = []
    if source.template.source == "chatml":
        notes.append(f"{source.name} carries no chat template: ChatML stands in")
    if drafter != "none" and loaded.model.spec.row_alignment is None:
        notes.append("rows are not padded here: in a near tie, greedy text may differ from plain decoding's")
    return notes


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise UsageError(f"{name}={value!r}: choose one of {', '.join(choices)}")
