"""The engine: a target and perhaps a draft, loaded once, that write text."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from types import TracebackType
from typing import Unpack

import numpy as np
from numpy.typing import NDArray

from edge_spec.assembly import KeptLessons, References, describe, make_drafters, past_answers, split_parked
from edge_spec.chat_template import ChatTemplate
from edge_spec.context import Surprisal, draft_score, report
from edge_spec.conversation import Chat
from edge_spec.decoding.decoder import SpeculativeDecoder
from edge_spec.decoding.drafter import Drafter
from edge_spec.decoding.scoring import surprisal
from edge_spec.decoding.session import Session
from edge_spec.drafting import ModelDrafter, PastAnswers
from edge_spec.errors import UsageError
from edge_spec.fitting import fit
from edge_spec.generation import EngineInfo, GenerationOptions, Stream, make_result
from edge_spec.ladder import Ladder, make_governor, make_ladder
from edge_spec.loading import Source, StageProgress
from edge_spec.memory.budget import granted
from edge_spec.memory.governor import Governor
from edge_spec.memory.pressure import OwnMemory
from edge_spec.opening import (
    DRAFTERS,
    NEED_MODEL,
    NO_HISTORY,
    LoadOptions,
    check_choice,
    open_models,
    resolve,
)
from edge_spec.prompting import Prompting
from edge_spec.store import Store
from edge_spec.tokenizer import Tokenizer
from edge_spec.types import (
    Condensing,
    Dropped,
    GenerationResult,
    Hole,
    ModelSpec,
    Progress,
    Prompt,
    SamplingParams,
)

COPYING = ("reference", "auto")
"""Drafters that copy from references."""


class Engine:
    """A loaded target, its draft and their caches. Made by `load`; a context manager; for one generation at a time."""

    def __init__(
        self,
        info: EngineInfo,
        source: Source,
        target: Session,
        drafters: dict[str, Drafter],
        kept: KeptLessons,
        *,
        governor: Governor,
        ladder: Ladder,
        default: str,
        past: PastAnswers | None = None,
    ) -> None:
        self.info = info
        self._source = source
        self._prompting = Prompting(source.template, source.tokenizer)
        self._target = target
        self._drafters = drafters
        self._governor = governor
        self._ladder = ladder
        self._default = default
        self._past = past
        self._references = References(source.tokenizer)
        self._kept = kept
        kept.restore(drafters["auto"])

    @classmethod
    def load(
        cls,
        pair: str | None = None,
        *,
        target: str | Path | None = None,
        draft: str | Path | None = None,
        smaller_drafts: Sequence[str | Path] = (),
        backend: str = "auto",
        draft_backend: str | None = None,
        drafter: str = "auto",
        draft_tokens: int | None = None,
        threads: int | None = None,
        n_ctx: int | None = None,
        recipe: str | None = None,
        pad_rows: bool = True,
        history: bool = False,
        ram: str | int | None = None,
        kv: str | None = None,
        parked: str | int = 0,
        on_progress: StageProgress | None = None,
    ) -> Engine:
        """Load a pair by its name (default: qwen2.5-coder), or `target` and, if wanted, `draft`.

        Models are names, hub references that were pulled, paths of GGUF files or of exports. The first load of a GGUF
        on any backend but llama exports it into the store.

        `smaller_drafts`, the best first, are for where memory is short: the first that fits takes the draft's place
        before drafts are given up. A pair's manifest may name them too.

        `backend` is "native", "onnx", "openvino", "llama", or "auto": what `edge-spec doctor --compare` found fastest
        on this machine for these models, of what is installed and can do what is asked for; where it was not asked
        about native, that one if its kernels know this processor and there is a compiler, and where it was not asked at
        all, else onnx.
        `draft_backend` defaults to `backend`, and to onnx where that is openvino.

        `drafter` is what generations use unless told otherwise: "auto" (text that repeats, else the draft model),
        "lookup", "reference" (texts that come with each prompt), "history", "model", "cascade" (the model, itself
        drafted for by lookup) or "none"; the draft is loaded for "auto", "model" and "cascade". `draft_tokens` is the
        longest draft of the model. `threads` defaults to what `edge-spec doctor` found, else to the physical cores,
        `n_ctx` to 4,096 tokens or the model's own limit. `recipe` (of the target) defaults to 4 bits, or 8 where the
        source has more than 6. `pad_rows=False` gives up bit-for-bit equality between drafters at temperature 0 for a
        little speed of plain decoding.

        `kv` is what keys and values are stored as, the draft's too where it runs on the same backend: "f16" or "f32" on
        native, "f32" or "q8" on onnx, "f16", "f32" or "u8" on openvino, "f16", "f32", "bf16", "q8_0", "q5_1", "q5_0",
        "q4_1" or "q4_0" on llama, the first of each unless given. Fewer bits take less memory and change the text; with
        "u8" it depends on the drafter too.

        `parked` (a size like "256MiB", or bytes) is what the caches may hold of chats that another one has displaced,
        so that one that goes on reads only what is new; without it, chats that take turns read their own parts again
        each time. What no longer fits goes, the least recently used first. The text does not change for it.

        `history` keeps the ids of every answer in a file of at most 4 MiB that only this user may read, and lets
        "auto" and "history" copy from it: `edge-spec history` shows and clears it.

        `ram` is the most memory that the process may hold: a size ("3GiB"), bytes, or the name of a device; it is never
        more than what the machine has to spare, which is what None stands for. What does not fit is made to, before
        anything is loaded: nothing parked, shorter passes over prompts, a smaller window unless `n_ctx` asks for one,
        no draft; the notes and `info.given_up` say which. While it runs the same budget is watched: see
        `FinishReason.MEMORY`.

        Raises MemoryBudgetError (with what would fit), ModelNotFoundError (with the command that fetches it),
        VocabMismatchError, BackendUnavailableError, UnsupportedArchitectureError, ModelFormatError, UsageError,
        StorageError.
        """
        started = perf_counter()
        store = Store()
        options = LoadOptions(
            pair=pair,
            target=target,
            draft=draft,
            smaller_drafts=tuple(smaller_drafts),
            backend=backend,
            draft_backend=draft_backend,
            drafter=drafter,
            draft_tokens=draft_tokens,
            threads=threads,
            n_ctx=n_ctx,
            recipe=recipe,
            pad_rows=pad_rows,
            history=history,
            ram=ram,
            kv=kv,
            parked=parked,
        )
        fitted = fit(resolve(options, store, on_progress), options)
        request = fitted.request
        models = open_models(request, store, on_progress)
        past = past_answers(store, request.source.tokenizer) if history else None
        of_target, of_draft = split_parked(models, request.parked)
        drafters = make_drafters(models, past, draft_tokens, batch=request.batch, parked=of_draft)
        session = Session(models.target.model, chunk=request.batch, parked_bytes=of_target)
        ladder = make_ladder(session, drafters)
        return cls(
            describe(fitted, models, drafter, perf_counter() - started),
            request.source,
            session,
            drafters,
            KeptLessons.of(request, models, store),
            governor=make_governor(fitted.budget, ladder),
            ladder=ladder,
            default=drafter,
            past=past,
        )

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
        on_full: str = "error",
        keep: float | None = None,
        on_progress: Progress | None = None,
    ) -> Stream:
        """Answer `prompt`; text comes as it is written.

        The prompt is a user's message, after `system` if given, in the model's chat template; with `raw` it is the
        text to continue. Ends at the end of the turn, a `stop` string, `max_tokens` or a full window. `sampling`
        defaults to greedy. `reference`: texts that the answer is likely to copy from (a file to edit, what was
        retrieved), whether or not the prompt holds them; they change its speed only. `on_full`: "error" refuses a
        prompt that does not fit, and ends the text where the window is full; "sinks" evicts the middle and goes on.
        `keep`, in (0, 1): the draft model chooses the share of the prompt that is read; what it could have guessed is
        left out (see `Surprisal`).
        `on_progress(read, to_read)` is called while the prompt is read; False cancels.
        Raises UsageError and ContextLengthError at the call.
        """
        n_ctx = self._target.spec.n_ctx
        prompt, condensing = self._condense(prompt, keep)
        made = self._prompting.make(prompt, system=system, raw=raw, on_full=on_full, n_ctx=n_ctx)
        return self._stream_ids(
            replace(made, condensing=condensing),
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
        on_full: str = "error",
        keep: float | None = None,
        **options: Unpack[GenerationOptions],
    ) -> GenerationResult:
        """`stream`, read to its end."""
        stream = self.stream(prompt, system=system, raw=raw, on_full=on_full, keep=keep, **options)
        for _ in stream:
            pass
        return stream.result

    def stream_prompt(self, prompt: Prompt, **options: Unpack[GenerationOptions]) -> Stream:
        """Continue a prompt of ids, made by the caller or by `Chat.prompt`; the options are those of `stream`."""
        return self._stream_ids(prompt, **options)

    def chat(self, *, system: str | None = None, on_full: str = "turns", n_ctx: int | None = None) -> Chat:
        """A conversation; `system` defaults to the pair's own, then to the template's.

        `on_full` says what happens when it outgrows the window: "turns" drops the oldest turns but the first, "sinks"
        evicts the middle from the cache, while it writes too, and "error" raises ContextLengthError. `n_ctx`: tokens
        that prompts may have, where that is to be less than the engine's window.
        """
        system = system if system is not None else self.info.chat_system
        return Chat(
            self._stream_ids,
            self._source.template,
            self._source.tokenizer,
            system=system,
            on_full=on_full,
            window=lambda: min(n_ctx or sys.maxsize, self._target.spec.n_ctx),
            condense=self._condense,
        )

    def count(self, text: str) -> int:
        """Tokens of `text`, as plain text."""
        return len(self._source.tokenizer.encode(text))

    def condense(self, text: str, keep: float) -> tuple[str, Condensing]:
        """What `keep` makes of a text, as a generation would read it, and what was left out. Raises UsageError."""
        condensed, condensing = self._condense(text, keep)
        assert condensing is not None, "keep was given"
        return condensed, condensing

    def score(self, prompt: Prompt, ids: Sequence[int]) -> NDArray[np.float64]:
        """Minus the log-probability in nats of each of `ids` behind `prompt`, float64 [len(ids)], by the target.

        Raises UsageError for an empty prompt, ContextLengthError.
        """
        return surprisal(self._target, prompt.ids, ids, prompt.holes)

    @property
    def spec(self) -> ModelSpec:
        """What the target is and can do, its window as it is now."""
        return self._target.spec

    @property
    def template(self) -> ChatTemplate:
        """What makes a prompt of messages."""
        return self._source.template

    @property
    def tokenizer(self) -> Tokenizer:
        """The target's, which is the draft's too."""
        return self._source.tokenizer

    def reset(self) -> None:
        """Forget what the caches hold and what is parked, so that the next prompt is read from its first token."""
        for session in self._sessions():
            session.forget()

    def limit_memory(self, ram: str | int) -> None:
        """From now on the process may hold so much: a size, a device's name or bytes, as `ram` of `load`.

        For a program that is told to hold less; may be called from another thread. What is given up for it, in the
        middle of a generation too, is in the result. Raises UsageError for a size that is none.
        """
        bound = granted(ram)
        self._governor.watch(OwnMemory(bound.n_bytes))
        self.info = replace(self.info, budget_bytes=bound.n_bytes)

    @property
    def measures(self) -> list[str]:
        """What was given up because memory was short, in the generation that runs or ran last."""
        return self._governor.measures

    def unpadded(self) -> AbstractContextManager[None]:
        """Within the block the target's passes are not padded, as with `pad_rows=False`.

        That is what plain decoding costs where nothing has to be equal to it. The target's cache is forgotten at both
        ends. Nothing changes where passes are not padded anyway.
        """
        return self._target.unpadded()

    def close(self) -> None:
        """Keep what was learnt and give the memory back. Closing twice is not an error."""
        self._kept.keep(self._drafters["auto"])
        for session in self._sessions():
            session.close()

    def _sessions(self) -> list[Session]:
        model = self._drafters.get("model")
        return [self._target, model.session] if isinstance(model, ModelDrafter) else [self._target]

    def _stream_ids(
        self,
        prompt: Prompt,
        *,
        max_tokens: int | None = None,
        sampling: SamplingParams | None = None,
        stop: Sequence[str] = (),
        drafter: str | None = None,
        reference: Sequence[str] = (),
        on_progress: Progress | None = None,
        done: Callable[[GenerationResult, list[Hole]], None] | None = None,
    ) -> Stream:
        tokenizer, governor = self._source.tokenizer, self._governor
        decoder = SpeculativeDecoder(self._target, self._choose_drafter(drafter, reference))
        references = self._references.ids(reference)
        refused = self._target.num_refused_rollbacks

        def finish(stream: Stream) -> GenerationResult:
            policy = prompt.eviction.policy if prompt.eviction else "sinks"
            evicted = report(decoder.stats.holes, tokenizer.decode, policy)
            info = replace(self.info, n_ctx=self._target.spec.n_ctx)  # which the governor may have made smaller
            result = make_result(stream, prompt=prompt, info=info, evicted=evicted, measures=governor.measures)
            result.notes.extend(governor.notes)
            if evicted and not self._target.spec.can_evict:
                result.notes.append("this backend cannot evict from its cache, so what was left was read again")
            if self._target.num_refused_rollbacks > refused:
                result.notes.append("the backend could not drop tokens from its cache, so the context was read again")
            self._remember(result)
            if done is not None:
                done(result, decoder.stats.holes)
            return result

        governor.begin()
        self._ladder.attend(decoder.prune_now)
        return Stream(
            lambda cancelled: decoder.generate(
                prompt.ids,
                sampling=sampling,
                max_tokens=max_tokens,
                stop_ids=tokenizer.stop_ids,
                references=references,
                archive=prompt.all_archive,
                holes=prompt.holes,
                eviction=prompt.eviction,
                cancelled=cancelled,
                on_progress=on_progress,
                supervisor=governor,
            ),
            decoder,
            tokenizer.stream(previous=prompt.ids[-1] if prompt.ids else None),
            stop,
            finish,
        )

    def _condense(self, text: str, keep: float | None) -> tuple[str, Condensing | None]:
        """The text without what tells least, and what became of it."""
        if keep is None:
            return text, None
        model = self._drafters.get("model")
        if not 0 < keep < 1:
            raise UsageError(f"keep={keep!r} is a share between 0 and 1")
        if not isinstance(model, ModelDrafter):
            raise UsageError("keep needs a draft model, which scores the prompt: load the engine with one")
        started, tokenizer = perf_counter(), self._source.tokenizer
        room = max(model.session.spec.max_rows, model.session.spec.n_ctx - 1)
        condensed = Surprisal(keep).condense(text, tokenizer, draft_score(model.session, room=room))
        dropped = Dropped("surprisal", condensed.tokens, "\n".join(condensed.left_out))
        archive = tuple(tokenizer.encode(text))
        return condensed.text, Condensing(dropped, archive, perf_counter() - started)

    def _remember(self, result: GenerationResult) -> None:
        if self._past is not None:
            self._past.add(result.token_ids)
            result.notes.extend(self._past.take_problems())

    def _choose_drafter(self, name: str | None, reference: Sequence[str]) -> Drafter:
        name = name or self._default
        check_choice("drafter", name, DRAFTERS)
        if isinstance(reference, str) or not all(isinstance(text, str) for text in reference):
            raise UsageError("reference is a list of texts")
        if reference and name not in COPYING:
            raise UsageError(f"the drafter {name!r} copies from no reference: use {' or '.join(COPYING)}")
        if name == "reference" and not reference:
            raise UsageError("the drafter 'reference' needs texts to copy from: give it reference=[...]")
        if name == "history" and name not in self._drafters:
            raise UsageError(NO_HISTORY)
        if name in NEED_MODEL and name not in self._drafters:
            raise UsageError("no draft model was loaded: load the engine with a draft, or use 'lookup'")
        return self._drafters[name]
