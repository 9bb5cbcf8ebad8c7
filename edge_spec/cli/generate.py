"""`edge-spec generate`: one prompt, one text."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import asdict, replace
from typing import Annotated, Any

import typer

from edge_spec.cli import options
from edge_spec.cli.console import INTERRUPTED
from edge_spec.cli.options import BackendChoice, DrafterName, OnFullPrompt
from edge_spec.cli.progress import ProgressDisplay
from edge_spec.cli.status import remark, remark_notes, status_line
from edge_spec.cli.streaming import Outcome, follow, show
from edge_spec.errors import UsageError
from edge_spec.types import GenerationResult, SamplingParams


def generate(
    *,
    prompt: Annotated[
        str | None, typer.Argument(help="The prompt; - (or none, with piped input) reads standard input.")
    ] = None,
    system: options.SystemOption = None,
    raw: Annotated[bool, typer.Option("--raw", help="No chat template: the model continues the prompt.")] = False,
    max_tokens: options.MaxTokensOption = None,
    stop: options.StopOption = None,
    on_full: options.OnFullPromptOption = OnFullPrompt.ERROR,
    keep: options.KeepOption = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object with the text and all figures instead.")
    ] = False,
    pair: options.PairOption = None,
    target: options.TargetOption = None,
    draft: options.DraftOption = None,
    backend: options.BackendOption = BackendChoice.AUTO,
    draft_backend: options.DraftBackendOption = None,
    recipe: options.RecipeOption = None,
    threads: options.ThreadsOption = None,
    ctx: options.CtxOption = None,
    ram: options.RamOption = None,
    drafter: options.DrafterOption = DrafterName.AUTO,
    draft_tokens: options.DraftTokensOption = None,
    reference: options.ReferenceOption = None,
    history: options.HistoryOption = False,
    no_pad: options.NoPadOption = False,
    kv: options.KvOption = None,
    temperature: options.TemperatureOption = None,
    top_k: options.TopKOption = None,
    top_p: options.TopPOption = None,
    min_p: options.MinPOption = None,
    repetition_penalty: options.RepetitionPenaltyOption = None,
    presence_penalty: options.PresencePenaltyOption = None,
    frequency_penalty: options.FrequencyPenaltyOption = None,
    seed: options.SeedOption = None,
) -> None:
    """Answer one prompt. The text streams to standard output, a status line follows on standard error."""
    if raw and system is not None:
        raise UsageError("--raw writes no chat template, so --system has no place in it: drop one of the two")
    chosen = options.given(
        {
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "min_p": min_p,
            "repetition_penalty": repetition_penalty,
            "presence_penalty": presence_penalty,
            "frequency_penalty": frequency_penalty,
            "seed": seed,
        }
    )
    sampling = replace(SamplingParams(), **chosen)
    stops = options.stop_strings(stop)
    references = options.reference_texts(reference, drafter)
    text = _read_prompt(prompt, raw=raw)
    if idle := options.idle_choices(chosen, sampling):
        remark_notes([idle])

    progress = ProgressDisplay()
    engine = options.load_engine(
        progress,
        pair=pair,
        target=target,
        draft=draft,
        backend=backend,
        draft_backend=draft_backend,
        drafter=drafter,
        draft_tokens=draft_tokens,
        recipe=recipe,
        threads=threads,
        ctx=ctx,
        ram=ram,
        no_pad=no_pad,
        kv=kv,
        history=history,
    )
    with engine:
        with progress:
            stream = engine.stream(
                text,
                system=system,
                raw=raw,
                on_full=on_full.value,
                keep=keep,
                max_tokens=max_tokens,
                sampling=sampling,
                stop=stops,
                reference=references,
                on_progress=progress.prefill,
            )
            outcome = follow(stream, _discard) if as_json else show(stream, progress)
        _report(outcome, as_json=as_json)
    if outcome.interrupted:
        raise typer.Exit(INTERRUPTED)


def _read_prompt(prompt: str | None, *, raw: bool) -> str:
    """The prompt from the argument or standard input. Raises UsageError if there is none, or none that is text."""
    try:
        if prompt == "-" or (prompt is None and not sys.stdin.isatty()):
            prompt = sys.stdin.buffer.read().decode("utf-8")
            if not raw:  # The newline that `echo` adds is not part of a question; a raw text is taken to the letter.
                prompt = prompt.rstrip("\r\n")
        (prompt or "").encode("utf-8")  # Bytes of an argument that are no text arrive as lone surrogates.
    except UnicodeError as exc:
        raise UsageError(f"the prompt is not UTF-8 text: {exc}") from exc
    if not prompt or not (raw or prompt.strip()):
        raise UsageError("the prompt is empty: give a PROMPT, or - to read it from standard input")
    return prompt


def _discard(_text: str) -> None:
    """For --json, which prints the text as a part of its object."""


def _report(outcome: Outcome, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(result_fields(outcome.result), allow_nan=False), flush=True)
    else:
        remark(status_line(outcome.result))
        remark_notes(outcome.result.notes)


def result_fields(result: GenerationResult) -> dict[str, Any]:
    """A result as JSON values: enums as strings, and null for a figure that is not finite.

    `backend` is the target's, as everywhere; that a draft ran on another one is a note, and so is what was dropped.
    """
    fields = asdict(replace(result, drafters=dict(result.drafters)))
    fields["finish_reason"] = str(result.finish_reason)
    del fields["dropped"]
    draft_backend = fields.pop("draft_backend")
    if draft_backend not in (None, result.backend):
        fields["notes"] = [*result.notes, f"the draft ran on the {draft_backend} backend"]
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in fields.items()
    }
