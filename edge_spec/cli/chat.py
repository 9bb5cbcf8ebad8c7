"""`edge-spec chat`: a conversation at the terminal, or one turn for each piped line."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import replace

import typer

from edge_spec.cli import options
from edge_spec.cli.console import FAILED, INTERRUPTED
from edge_spec.cli.conversation import Conversation
from edge_spec.cli.options import BackendChoice, DrafterName, OnFull
from edge_spec.cli.progress import ProgressDisplay
from edge_spec.cli.status import banner, remark, remark_notes
from edge_spec.errors import UsageError

_HISTORY_FILE = "chat_history"


def chat(
    *,
    system: options.SystemOption = None,
    max_tokens: options.MaxTokensOption = None,
    stop: options.StopOption = None,
    on_full: options.OnFullOption = OnFull.TURNS,
    keep: options.KeepOption = None,
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
    """Talk with a model. Without a terminal each line of standard input is a turn."""
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
    stops = options.stop_strings(stop)
    references = options.reference_texts(reference, drafter)
    on_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    with _quiet_keyboard() if on_terminal else nullcontext():
        engine = options.load_engine(
            ProgressDisplay(),
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
        sampling = replace(engine.info.chat_sampling, **chosen)
        conversation = Conversation(
            engine,
            system=system,
            on_full=on_full.value,
            keep=keep,
            max_tokens=max_tokens,
            sampling=sampling,
            stop=stops,
            reference=references,
            copies=drafter in options.COPYING,
        )
        remark(banner(engine.info))
        remark_notes(engine.info.notes)
        if idle := options.idle_choices(chosen, sampling):
            remark_notes([idle])
        if on_terminal:
            _talk(conversation)
        else:
            _answer_lines(conversation)


def _quiet_keyboard() -> AbstractContextManager[None]:
    """What is typed ahead does not show between the bars; the first prompt takes it up."""
    from edge_spec.cli.prompt import echo_off

    return echo_off()


def _talk(conversation: Conversation) -> None:
    from edge_spec.cli.prompt import LinePrompt, echo_off
    from edge_spec.store import Store

    remark("/help lists the commands; Ctrl-C stops an answer, Ctrl-D leaves")
    for message in LinePrompt(Store().cache_dir / _HISTORY_FILE):
        # Ctrl-C between the pieces of a turn, where no stream is there to be stopped: the session goes on.
        with suppress(KeyboardInterrupt), echo_off():
            if not conversation.handle(message):
                return


def _answer_lines(conversation: Conversation) -> None:
    """Take a turn for each line. Exits with 130 if Ctrl-C stopped one, with 1 if one failed."""
    for line in _stdin_lines():
        if not conversation.handle(line):
            break
        if conversation.interrupted:
            raise typer.Exit(INTERRUPTED)
    if conversation.failed:
        raise typer.Exit(FAILED)


def _stdin_lines() -> Iterator[str]:
    for number, line in enumerate(sys.stdin.buffer, start=1):
        try:
            yield line.decode("utf-8")
        except UnicodeDecodeError as exc:
            raise UsageError(f"line {number} of standard input is not UTF-8 text: {exc}") from exc
