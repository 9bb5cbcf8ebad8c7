"""An engine without models: answers are scripted, every call is recorded, and the whole CLI runs on it."""

from __future__ import annotations

import io
import re
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from edge_spec.decoding.decoder import DecodeStats
from edge_spec.errors import EdgeSpecError
from edge_spec.types import DrafterStats, FinishReason, GenerationResult, Piece, SamplingParams

_ANSI = re.compile(r"\x1b\[[0-9;]*m")  # Usage errors come in colour where a CI service asks for it.


@dataclass(frozen=True)
class Transcript:
    """What a command left behind."""

    code: int
    out: str
    err: str


def run(*args: str, stdin: str | bytes = "") -> Transcript:
    """Run `edge-spec` with these arguments in this process; none of its three streams is a terminal."""
    from edge_spec.cli import main

    given = stdin.encode() if isinstance(stdin, str) else stdin
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", newline="") for _ in range(2))
    keyboard, sys.stdin = sys.stdin, io.TextIOWrapper(io.BytesIO(given), encoding="utf-8")
    try:
        with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as ended:
            main(args)
    finally:
        sys.stdin = keyboard
    return Transcript(int(ended.value.code or 0), _written(out), _ANSI.sub("", _written(err)))


def _written(stream: io.TextIOWrapper) -> str:
    stream.flush()
    assert isinstance(stream.buffer, io.BytesIO)
    return stream.buffer.getvalue().decode()


@dataclass
class FakeInfo:
    target: str = "big"
    draft: str | None = "small"
    backend: str = "onnx"
    recipe: str = "int4"
    threads: int = 2
    n_ctx: int = 4096
    load_s: float = 1.5
    notes: list[str] = field(default_factory=list)
    chat_sampling: SamplingParams = field(default_factory=lambda: SamplingParams(temperature=0.7, top_p=0.8))
    chat_system: str | None = "You are scripted."
    draft_backend: str | None = "onnx"
    budget_bytes: int | None = None
    planned_bytes: int | None = None
    given_up: tuple[str, ...] = ()
    kv: str = "f32"


@dataclass(frozen=True)
class Answer:
    """One scripted answer.

    `pieces`: the texts in order; a callable among them is called at its place (to press Ctrl-C, say).
    `error` is raised after the pieces. `prefill`: the (done, total) calls of `on_progress`; before the first of them
    `in_prefill` is called. `finish`, `notes` and `changes` go into the result.
    """

    pieces: Sequence[str | Callable[[], None]] = ()
    error: EdgeSpecError | None = None
    prefill: Sequence[tuple[int, int]] = ()
    in_prefill: Callable[[], None] | None = None
    finish: FinishReason = FinishReason.STOP
    notes: tuple[str, ...] = ()
    changes: dict[str, Any] = field(default_factory=dict)


class FakeStream:
    """Plays an `Answer`; `cancel` takes effect before the next piece."""

    def __init__(self, engine: FakeEngine, answer: Answer, on_progress: Callable[[int, int], object] | None) -> None:
        self._engine = engine
        self._answer = answer
        self._on_progress = on_progress
        self._result: GenerationResult | None = None
        self.cancelled = False
        self.closed = False
        self.text = ""
        self.first_tokens = 1
        self.stats = DecodeStats(draft_s=0.3, draft_model_s=0.2, target_s=1.6, own_s=0.1)

    def cancel(self) -> None:
        self.cancelled = True

    def close(self) -> None:
        self.closed = True

    @property
    def result(self) -> GenerationResult:
        if self._result is None:
            raise RuntimeError("the stream has not ended")
        return self._result

    def __iter__(self) -> Iterator[Piece]:
        self._prefill()
        num_tokens = 0
        for piece in self._answer.pieces:
            if self.cancelled:
                break
            if callable(piece):
                piece()
                continue
            num_tokens += 1
            self.text += piece
            yield Piece(piece, (num_tokens,))
        if not self.cancelled and self._answer.error is not None:
            raise self._answer.error
        finish = FinishReason.CANCELLED if self.cancelled else self._answer.finish
        self._result = self._engine.make_result(self.text, num_tokens, finish, self._answer)

    def _prefill(self) -> None:
        if self._answer.in_prefill is not None:
            self._answer.in_prefill()
        for done, total in self._answer.prefill:
            if self._on_progress is not None:
                self._on_progress(done, total)


class FakeChat:
    def __init__(self, engine: FakeEngine, system: str | None) -> None:
        self._engine = engine
        self._system = system
        self.messages: list[dict[str, str]] = []
        self.reset()

    def reset(self) -> None:
        self.messages[:] = [{"role": "system", "content": self._system}] if self._system else []

    def stream(self, text: str, *, on_progress: Any = None, **options: Any) -> FakeStream:
        self._engine.turns.append(text)
        self._engine.options.append(options)
        self.messages.append({"role": "user", "content": text})
        return self._engine.next_stream(on_progress)


class FakeEngine:
    """Gives the scripted answers one after the other.

    Records: `loaded_with`, `turns`, `options`, `chats`, `streams`, and in `log` also resets and paddings.
    """

    def __init__(self, *answers: Answer | str, info: FakeInfo | None = None) -> None:
        self.info = info or FakeInfo()
        self._answers = [Answer([answer]) if isinstance(answer, str) else answer for answer in answers]
        self.load_error: EdgeSpecError | None = None
        self.load_progress: list[tuple[str, int, int]] = []
        self.loaded_with: dict[str, Any] | None = None
        self.turns: list[str] = []
        self.options: list[dict[str, Any]] = []
        self.chats: list[FakeChat] = []
        self.chat_options: list[dict[str, Any]] = []
        self.streams: list[FakeStream] = []
        self.log: list[str] = []
        self.closed = False

    def load(self, pair: str | None = None, *, on_progress: Any = None, **options: Any) -> FakeEngine:
        """Stands in for `Engine.load`."""
        self.loaded_with = {"pair": pair, **options}
        for step in self.load_progress:
            on_progress(*step)
        if self.load_error is not None:
            raise self.load_error
        return self

    def install(self, monkeypatch: pytest.MonkeyPatch) -> FakeEngine:
        """Make `edge_spec.engine.Engine.load` give this engine."""
        module = types.ModuleType("edge_spec.engine")
        module.Engine = self  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "edge_spec.engine", module)
        return self

    def stream(self, prompt: str, *, on_progress: Any = None, **options: Any) -> FakeStream:
        self.turns.append(prompt)
        self.options.append(options)
        return self.next_stream(on_progress)

    def chat(self, *, system: str | None = None, **options: Any) -> FakeChat:
        self.chat_options.append(options)
        self.chats.append(FakeChat(self, self.info.chat_system if system is None else system))
        return self.chats[-1]

    def reset(self) -> None:
        self.log.append("reset")

    @contextmanager
    def unpadded(self) -> Iterator[None]:
        self.log.append("unpadded")
        yield
        self.log.append("padded")

    def next_stream(self, on_progress: Any) -> FakeStream:
        self.streams.append(FakeStream(self, self._answers.pop(0), on_progress))
        self.log.append(f"{self.options[-1].get('drafter')}: {self.turns[-1]}")
        return self.streams[-1]

    def make_result(self, text: str, num_tokens: int, finish: FinishReason, answer: Answer) -> GenerationResult:
        result = GenerationResult(
            text=text,
            token_ids=list(range(1, num_tokens + 1)),
            prompt_tokens=10,
            generated_tokens=num_tokens,
            finish_reason=finish,
            load_s=self.info.load_s,
            ttft_s=0.25,
            decode_tokens_per_s=50.0,
            total_s=2.0,
            steps=20,
            drafted=40,
            accepted=30,
            acceptance_rate=0.75,
            tokens_per_step=2.5,
            drafters={"model": DrafterStats(20, 40, 30)},
            target=self.info.target,
            draft=self.info.draft,
            backend=self.info.backend,
            draft_backend=self.info.draft_backend,
            recipe=self.info.recipe,
            threads=self.info.threads,
            n_ctx=self.info.n_ctx,
            peak_rss_bytes=3 * 2**29,
            notes=list(answer.notes),
        )
        return replace(result, **answer.changes)

    def close(self) -> None:
        self.closed = True

    def __enter__(self) -> FakeEngine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
