"""What a line of a chat does, wherever the line comes from: a turn, or a command that starts with a slash."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from edge_spec.cli.options import read_reference
from edge_spec.cli.progress import ProgressDisplay
from edge_spec.cli.status import drafter_line, figures, remark, remark_notes, setup
from edge_spec.cli.streaming import show
from edge_spec.errors import ContextLengthError, EdgeSpecError, UsageError
from edge_spec.types import DrafterStats, FinishReason, GenerationResult, SamplingParams

if TYPE_CHECKING:
    from edge_spec.engine import Engine

_COMMANDS = ("/help", "/reset", "/stats", "/quit")
_HELP = """\
/help            this text
/reset           forget the conversation and start over
/reference FILE  answers may copy from this text file, which makes them faster
/stats           what this session has cost so far
/quit            leave (so does Ctrl-D)
Alt-Enter, or a backslash at the end of the line, starts a new line; Enter sends.
Ctrl-C stops an answer and keeps the session. A message that starts with a slash is written with two: //"""


class Conversation:
    """The turns of one chat. Answers go to standard output, everything else to standard error."""

    def __init__(
        self,
        engine: Engine,
        *,
        system: str | None,
        on_full: str,
        keep: float | None = None,
        max_tokens: int | None,
        sampling: SamplingParams,
        stop: Sequence[str],
        reference: Sequence[str] = (),
        copies: bool = True,
    ) -> None:
        """`reference`: texts that answers may copy from; `copies`: the drafter can do that."""
        self.failed = False
        """A turn ended in an error."""
        self.interrupted = False
        """Ctrl-C stopped the last turn."""
        self._info = engine.info
        self._chat = engine.chat(system=system, on_full=on_full)
        self._keep = keep
        self._max_tokens = max_tokens
        self._sampling = sampling
        self._stop = stop
        self._reference = tuple(reference)
        self._copies = copies
        self._progress = ProgressDisplay()
        self._totals = _Totals()
        self._notes_shown = set(engine.info.notes)

    def handle(self, line: str) -> bool:
        """Run a command or take a turn; False if the user wants to leave. An error of a turn is shown, not raised."""
        text = line.strip()
        if text.startswith("//"):
            self._take_turn(text[1:])
        elif text.startswith("/"):
            return self._run(text)
        elif text:
            self._take_turn(text)
        return True

    def _run(self, command: str) -> bool:
        match command:
            case "/help":
                remark(_HELP)
            case "/reset":
                self._chat.reset()
                self._totals.last = None
                remark("the conversation is forgotten")
            case "/stats":
                remark("\n".join(self._stats()))
            case "/quit":
                return False
            case _ if command.split(maxsplit=1)[0] == "/reference":
                self._add_reference(command.removeprefix("/reference").strip())
            case _:
                name = command.split(maxsplit=1)[0]
                reason = f"{name} takes no argument" if name in _COMMANDS else f"unknown command {name}"
                remark(f"{reason}, nothing was sent: /help lists the commands, //... sends a text that starts with /")
        return True

    def _add_reference(self, file: str) -> None:
        if not self._copies:
            remark("the drafter of this session copies from no reference: --drafter auto does")
            return
        if not file:
            remark("/reference takes a FILE")
            return
        try:
            self._reference += (read_reference(Path(file)),)
        except UsageError as exc:
            remark(f"error: {exc}")
            return
        remark(f"answers may copy from {file}")

    def _take_turn(self, text: str) -> None:
        self.interrupted = False
        try:
            stream = self._chat.stream(
                text,
                keep=self._keep,
                max_tokens=self._max_tokens,
                sampling=self._sampling,
                stop=self._stop,
                reference=self._reference,
                on_progress=self._progress.prefill,
            )
            outcome = show(stream, self._progress)
        except EdgeSpecError as exc:
            self.failed = True
            remark(f"error: {exc}")
            if isinstance(exc, ContextLengthError):
                remark("/reset forgets the conversation and frees the window")
            return
        self.interrupted = outcome.interrupted
        self._report(outcome.result)

    def _report(self, result: GenerationResult) -> None:
        self._totals.add(result)
        remark(figures(result))
        remark_notes(note for note in result.notes if note not in self._notes_shown)
        self._notes_shown.update(result.notes)
        if result.finish_reason is FinishReason.CONTEXT_FULL:
            remark(
                f"the window of {result.n_ctx} tokens is full, so the answer ends here: "
                f"/reset starts over, --ctx gives a larger window"
            )

    def _stats(self) -> list[str]:
        totals = self._totals
        used = totals.last.prompt_tokens + totals.last.generated_tokens if totals.last else 0
        return [
            f"answers: {totals.answers}, tokens: {totals.tokens}; {used} of {self._info.n_ctx} in the window",
            *([f"last answer: {figures(totals.last)}"] if totals.last else []),
            *(drafter_line(name, stats) for name, stats in totals.drafters.items()),
            setup(self._info),
        ]


class _Totals:
    """Sums over the answers of a session."""

    def __init__(self) -> None:
        self.answers = 0
        self.tokens = 0
        self.drafters: dict[str, DrafterStats] = {}
        self.last: GenerationResult | None = None

    def add(self, result: GenerationResult) -> None:
        self.answers += 1
        self.tokens += result.generated_tokens
        self.last = result
        for name, stats in result.drafters.items():
            sum_so_far = self.drafters.get(name, DrafterStats())
            self.drafters[name] = replace(
                sum_so_far,
                steps=sum_so_far.steps + stats.steps,
                drafted=sum_so_far.drafted + stats.drafted,
                accepted=sum_so_far.accepted + stats.accepted,
            )
