"""`edge-spec generate` by exact transcript, on a scripted engine."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from dataclasses import fields
from inspect import signature
from pathlib import Path
from typing import Any

import pytest

from edge_spec.errors import BackendError, BackendMemoryError, ContextLengthError, MemoryBudgetError, VocabMismatchError
from edge_spec.types import FinishReason, GenerationResult, SamplingParams
from tests.fake_engine import Answer, FakeEngine, FakeInfo, Transcript, run
from tests.pseudo_terminal import Terminal

FIGURES = "50.0 tokens/s · 75% accepted · 2.50 tokens/step · first token 0.25 s · peak 1.50GiB"
SETUP = "big + small · onnx · int4 · 2 threads"


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> FakeEngine:
    return FakeEngine(Answer(["Hello", " wor", "ld"])).install(monkeypatch)


def interrupt() -> None:
    signal.raise_signal(signal.SIGINT)


def test_text_goes_to_stdout_and_the_status_line_to_stderr(engine: FakeEngine) -> None:
    assert run("generate", "Say hello") == Transcript(0, "Hello world\n", f"{FIGURES} · {SETUP}\n")
    assert engine.turns == ["Say hello"]
    assert engine.closed


def test_the_status_line_names_the_draft_s_backend_where_it_is_another(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeEngine(Answer(["a"], changes={"backend": "openvino", "draft_backend": "onnx"})).install(monkeypatch)
    assert "big + small · openvino + onnx · int4" in run("generate", "x").err


def test_a_text_that_ends_with_a_newline_gets_no_second_one(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeEngine("one\n").install(monkeypatch)
    assert run("generate", "x").out == "one\n"


def test_status_names_the_finish_reason_the_notes_and_a_missing_draft(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = Answer(
        ["a"],
        finish=FinishReason.LENGTH,
        notes=("the draft was parked", "another note"),
        changes={"drafted": 0, "accepted": 0, "acceptance_rate": 0.0, "tokens_per_step": 1.0},
    )
    FakeEngine(answer, info=FakeInfo(draft=None, threads=1)).install(monkeypatch)
    assert run("generate", "x").err == (
        "50.0 tokens/s · nothing drafted · 1.00 tokens/step · first token 0.25 s · peak 1.50GiB · finished: length · "
        "big · onnx · int4 · 1 thread\n"
        "note: the draft was parked\n"
        "note: another note\n"
    )


def test_json_is_one_object_with_every_field_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeEngine(Answer(["Grüße\n"], notes=("n",))).install(monkeypatch)
    transcript = run("generate", "x", "--json")
    assert transcript.code == 0
    assert transcript.err == ""
    assert transcript.out.count("\n") == 1
    result = json.loads(transcript.out)
    assert list(result) == [
        field.name for field in fields(GenerationResult) if field.name not in ("draft_backend", "dropped")
    ]
    assert result["text"] == "Grüße\n"
    assert result["finish_reason"] == "stop"
    assert result["drafters"] == {"model": {"steps": 20, "drafted": 40, "accepted": 30}}
    assert result["notes"] == ["n"]


def test_json_notes_a_draft_on_another_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeEngine(Answer(["a"], changes={"backend": "openvino", "draft_backend": "onnx"})).install(monkeypatch)
    assert json.loads(run("generate", "x", "--json").out)["notes"] == ["the draft ran on the onnx backend"]


def test_json_stays_valid_where_a_figure_is_not_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeEngine(Answer(["a"], changes={"decode_tokens_per_s": float("inf")})).install(monkeypatch)
    assert json.loads(run("generate", "x", "--json").out)["decode_tokens_per_s"] is None


def test_defaults_leave_every_choice_to_the_engine(engine: FakeEngine) -> None:
    run("generate", "x")
    assert engine.loaded_with == {
        "pair": None,
        "target": None,
        "draft": None,
        "backend": "auto",
        "draft_backend": None,
        "drafter": "auto",
        "draft_tokens": None,
        "recipe": None,
        "threads": None,
        "n_ctx": None,
        "ram": None,
        "pad_rows": True,
        "history": False,
        "kv": None,
    }
    assert engine.options == [
        {
            "system": None,
            "raw": False,
            "on_full": "error",
            "keep": None,
            "max_tokens": None,
            "sampling": SamplingParams(),
            "stop": (),
            "reference": (),
        }
    ]


def test_the_scripted_engine_is_called_as_the_real_one_is() -> None:
    from edge_spec.conversation import Chat
    from edge_spec.engine import Engine
    from edge_spec.generation import EngineInfo

    scripted = FakeEngine("a", "b", "c")
    with pytest.MonkeyPatch.context() as patch:
        scripted.install(patch)
        run("generate", "x")
        run("chat", stdin="x")
    generated, said = scripted.options
    signature(Engine.load).bind(**scripted.loaded_with or {}, on_progress=None)
    signature(Engine.stream).bind(None, "x", **generated, on_progress=None)
    signature(Chat.stream).bind(None, "x", **said, on_progress=None)
    signature(Engine.chat).bind(None, system=None, **scripted.chat_options[0])
    assert {field.name for field in fields(FakeInfo)} == {field.name for field in fields(EngineInfo)}


def test_every_option_reaches_the_engine(engine: FakeEngine) -> None:
    load = "--target t.gguf --draft d.gguf --backend llama --drafter model --draft-tokens 5 --recipe exact --threads 3"
    text = "--system Brief -n 7 --stop A --stop B --on-full sinks --keep 0.5"
    sampling = (
        "--temperature 0.5 --top-k 4 --top-p 0.9 --min-p 0.1 --repetition-penalty 1.1 --presence-penalty 0.2 "
        "--frequency-penalty 0.3 --seed 9"
    )
    load += " --draft-backend onnx --ctx 99 --ram 3GiB --no-pad --history --kv q8_0"
    transcript = run("generate", "x", *f"{load} {text} {sampling}".split())
    assert transcript.code == 0
    assert engine.loaded_with == {
        "pair": None,
        "target": "t.gguf",
        "draft": "d.gguf",
        "backend": "llama",
        "draft_backend": "onnx",
        "drafter": "model",
        "draft_tokens": 5,
        "recipe": "exact",
        "threads": 3,
        "n_ctx": 99,
        "ram": "3GiB",
        "pad_rows": False,
        "history": True,
        "kv": "q8_0",
    }
    assert engine.options == [
        {
            "system": "Brief",
            "raw": False,
            "on_full": "sinks",
            "keep": 0.5,
            "max_tokens": 7,
            "stop": ("A", "B"),
            "reference": (),
            "sampling": SamplingParams(
                temperature=0.5,
                top_k=4,
                top_p=0.9,
                min_p=0.1,
                repetition_penalty=1.1,
                presence_penalty=0.2,
                frequency_penalty=0.3,
                seed=9,
            ),
        }
    ]


@pytest.mark.parametrize("args", [("-",), ()])
def test_a_prompt_is_read_from_piped_input(engine: FakeEngine, args: tuple[str, ...]) -> None:
    assert run("generate", *args, stdin="first\nsecond – ü\n\n").code == 0
    assert engine.turns == ["first\nsecond – ü"]


def test_a_raw_prompt_from_piped_input_is_taken_to_the_letter(engine: FakeEngine) -> None:
    assert run("generate", "--raw", stdin="def f():\n").code == 0
    assert engine.turns == ["def f():\n"]
    assert engine.options[0]["raw"] is True


@pytest.mark.parametrize(
    ("args", "stdin", "reason"),
    [
        (("generate",), "", "the prompt is empty"),
        (("generate", "-"), " \n", "the prompt is empty"),
        (("generate", ""), "unread", "the prompt is empty"),
        (("generate",), b"\xff\xfe", "not UTF-8"),
        (("generate", "x", "--backend", "cuda"), "", "--backend"),
        (("generate", "x", "--drafter", "eagle"), "", "--drafter"),
        (("generate", "x", "--max-tokens", "0"), "", "--max-tokens"),
        (("generate", "x", "--threads", "0"), "", "--threads"),
        (("generate", "x", "--ctx", "-5"), "", "--ctx"),
        (("generate", "x", "--temperature", "warm"), "", "--temperature"),
        (("generate", "x", "--top-p", "1.5"), "", "top_p=1.5"),
        (("generate", "x", "--min-p", "1"), "", "min_p=1"),
        (("generate", "x", "--repetition-penalty", "0"), "", "repetition_penalty=0"),
        (("generate", "x", "--stop", ""), "", "--stop"),
        (("generate", "x", "--raw", "--system", "s"), "", "--system"),
        (("generate", "x", "--pair", "p", "--target", "t"), "", "--pair"),
        (("generate", "x", "y"), "", "y"),
        (("generate", "x", "--no-such-option"), "", "--no-such-option"),
    ],
)
def test_bad_usage_exits_with_2_before_anything_loads(
    engine: FakeEngine, args: tuple[str, ...], stdin: str | bytes, reason: str
) -> None:
    transcript = run(*args, stdin=stdin)
    assert transcript.code == 2
    assert transcript.out == ""
    assert reason in transcript.err
    assert engine.loaded_with is None


def test_sampling_options_without_a_temperature_are_not_dropped_in_silence(engine: FakeEngine) -> None:
    transcript = run("generate", "x", "--top-k", "5", "--seed", "1")
    assert transcript.err.startswith("note: no effect at temperature 0: --top-k, --seed; set --temperature to sample\n")
    assert transcript.code == 0


@pytest.mark.parametrize(
    "error", [BackendError("the library failed"), ContextLengthError(5000, 4096), VocabMismatchError("differ at 7")]
)
def test_a_failure_while_writing_keeps_the_text_and_exits_with_1(
    monkeypatch: pytest.MonkeyPatch, error: BackendError
) -> None:
    engine = FakeEngine(Answer(["half"], error=error)).install(monkeypatch)
    transcript = run("generate", "x")
    assert transcript.code == 1
    assert transcript.out == "half\n"
    assert str(error).split(",")[0] in transcript.err
    assert engine.closed


def test_a_failure_under_json_prints_no_object(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeEngine(Answer(["half"], error=BackendError("bad"))).install(monkeypatch)
    transcript = run("generate", "x", "--json")
    assert (transcript.code, transcript.out) == (1, "")


def test_ctrl_c_keeps_the_text_so_far_prints_the_status_and_exits_with_130(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = FakeEngine(Answer(["one ", "two", interrupt, " three"])).install(monkeypatch)
    assert run("generate", "x") == Transcript(130, "one two\n", f"{FIGURES} · finished: cancelled · {SETUP}\n")
    assert engine.streams[0].cancelled
    assert engine.closed
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_under_json_still_prints_the_object(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeEngine(Answer(["one", interrupt, "two"])).install(monkeypatch)
    transcript = run("generate", "x", "--json")
    assert transcript.code == 130
    assert json.loads(transcript.out)["text"] == "one"
    assert json.loads(transcript.out)["finish_reason"] == "cancelled"


def test_ctrl_c_while_the_prompt_is_read_exits_with_130(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeEngine(Answer(["never"], in_prefill=interrupt)).install(monkeypatch)
    assert run("generate", "x") == Transcript(130, "", f"nothing was written, finished: cancelled · {SETUP}\n")


def test_a_third_ctrl_c_does_not_wait_for_a_stream_that_will_not_end(monkeypatch: pytest.MonkeyPatch) -> None:
    def hammer() -> None:
        for _ in range(3):
            interrupt()

    engine = FakeEngine(Answer(["one", hammer, "two"])).install(monkeypatch)
    transcript = run("generate", "x")
    assert (transcript.code, transcript.out) == (130, "one\n")
    assert engine.closed


def test_without_a_terminal_an_export_says_so_in_a_line_and_the_rest_stays_quiet(engine: FakeEngine) -> None:
    engine.load_progress = [("export big", step, 300) for step in range(1, 301)] + [("load", 0, 1), ("load", 1, 1)]
    transcript = run("generate", "x")
    assert transcript.err == f"export big ...\n{FIGURES} · {SETUP}\n"


@pytest.mark.skipif(sys.platform == "win32", reason="pseudo-terminals are POSIX")
def test_on_a_terminal_bars_show_the_export_and_a_long_prompt_and_vanish(tmp_path: Path) -> None:
    script = """
        import pytest
        from tests.fake_engine import Answer, FakeEngine
        from edge_spec.cli import main

        engine = FakeEngine(Answer(["text"], prefill=[(0, 2000), (1000, 2000), (2000, 2000)]))
        engine.load_progress = [("export big", 0, 4), ("export big", 3, 4), ("load", 0, 1)]
        engine.install(pytest.MonkeyPatch())
        main(["generate", "x"])
    """
    with Terminal(script, tmp_path) as terminal:
        terminal.expect("export big")
        terminal.expect("reading the prompt")
        assert terminal.expect("text\n").endswith("\n")
        assert terminal.expect("\n") == f"{FIGURES} · {SETUP}"
        assert terminal.wait() == 0


def test_without_a_terminal_a_slow_stage_speaks_up_now_and_then(capsys: pytest.CaptureFixture[str]) -> None:
    from edge_spec.cli.progress import ProgressDisplay

    seconds = iter(range(100))
    progress = ProgressDisplay(clock=lambda: next(seconds))
    for done in range(0, 2400, 100):
        progress.prefill(done, 2400)
    assert capsys.readouterr().err == "reading the prompt 38% ...\nreading the prompt 79% ...\n"


def test_a_stage_without_steps_has_no_share(capsys: pytest.CaptureFixture[str]) -> None:
    from edge_spec.cli.progress import ProgressDisplay

    seconds = iter([0, 100])
    ProgressDisplay(clock=lambda: next(seconds)).stage("load big", 0, 1)
    assert capsys.readouterr().err == "load big ...\n"


def test_an_answer_of_one_pass_has_no_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeEngine(Answer(["a"], changes={"decode_tokens_per_s": 0.0})).install(monkeypatch)
    assert run("generate", "x").err == f"{FIGURES.removeprefix('50.0 tokens/s · ')} · {SETUP}\n"


def test_a_terminal_gets_no_control_characters_from_the_model(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from edge_spec.cli.streaming import AnswerText

    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    with AnswerText() as answer:
        answer.write("a\x1b[31mb\a\tc\x9bd\r\x7f")
    assert capsys.readouterr().out == "a[31mb\tcd\n"


def test_a_pipe_gets_the_text_to_the_letter(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeEngine("a\x1b[31mb\r\n").install(monkeypatch)
    assert run("generate", "x").out == "a\x1b[31mb\r\n"


def scripted_process(*args: str, **streams: Any) -> subprocess.Popen[bytes]:
    """`edge-spec` on a scripted engine in a process of its own, which writes 100,000 lines."""
    script = (
        "import pytest\n"
        "from tests.fake_engine import Answer, FakeEngine\n"
        "from edge_spec.cli import main\n"
        "FakeEngine(Answer(['line\\n'] * 100_000)).install(pytest.MonkeyPatch())\n"
        "main()\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", script, *args], stderr=subprocess.PIPE, cwd=Path(__file__).parents[1], **streams
    )


def test_a_reader_that_leaves_ends_the_run_quietly() -> None:
    process = scripted_process("generate", "x", stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    with process, process.stdout, process.stderr:
        assert process.stdout.readline() == b"line\n"
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode in (0, 1, 141)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no disk that is always full")
@pytest.mark.parametrize("args", [("generate", "x"), ("generate", "x", "--json"), ("models",)])
def test_standard_output_on_a_full_disk_is_one_line_and_exits_with_1(args: tuple[str, ...]) -> None:
    with Path("/dev/full").open("wb") as full:
        process = scripted_process(*args, stdin=subprocess.DEVNULL, stdout=full)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err.count(b"\n")) == (1, 1)
    assert err.startswith(b"error: ")
    assert b"No space left" in err


@pytest.mark.skipif(sys.platform == "win32", reason="streams are closed by a POSIX shell")
@pytest.mark.parametrize("args", [("generate", "x"), ("generate",), ("chat",), ("models",)])
def test_closed_standard_streams_are_no_traceback(args: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    from edge_spec.cli import main

    FakeEngine("a").install(monkeypatch)
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    with pytest.raises(SystemExit) as ended:
        main(args)
    assert ended.value.code == (2 if args == ("generate",) else 0)


def test_references_are_read_and_given_to_the_engine(engine: FakeEngine, tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("Grüße\n", "utf-8")
    (tmp_path / "two.py").write_text("x = 1", "utf-8")
    files = f"--reference {tmp_path}/one.txt --reference {tmp_path}/two.py".split()
    assert run("generate", "x", *files).code == 0
    assert engine.options[0]["reference"] == ("Grüße\n", "x = 1")


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--reference", "nowhere.txt"], "the reference nowhere.txt cannot be read"),
        (["--reference", "{folder}/empty.txt"], "is empty"),
        (["--reference", "{folder}/bytes.bin"], "cannot be read"),
        (["--reference", "{folder}/text.txt", "--drafter", "lookup"], "--drafter lookup copies from no reference"),
        (["--drafter", "reference"], "give --reference FILE"),
    ],
)
@pytest.mark.parametrize("command", [["generate", "x"], ["chat"]])
def test_a_reference_of_no_use_is_refused_before_anything_loads(
    engine: FakeEngine, tmp_path: Path, command: list[str], args: list[str], says: str
) -> None:
    (tmp_path / "empty.txt").write_text(" \n", "utf-8")
    (tmp_path / "text.txt").write_text("text", "utf-8")
    (tmp_path / "bytes.bin").write_bytes(b"\xff\xfe\x00")
    transcript = run(*command, *(arg.format(folder=tmp_path) for arg in args))
    assert transcript.code == 2
    assert says in transcript.err
    assert engine.loaded_with is None


def test_what_does_not_fit_the_memory_exits_with_3(engine: FakeEngine) -> None:
    engine.load_error = MemoryBudgetError(2**30, 2**29, 1024, "big needs 1.00GiB; what fits: --ctx 1024")
    transcript = run("generate", "x", "--ram", "512MiB")
    assert transcript.code == 3
    assert "--ctx 1024" in transcript.err
    engine.load_error = BackendMemoryError("not enough memory for loading big")
    assert run("generate", "x").code == 3
