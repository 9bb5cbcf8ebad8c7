"""`edge-spec chat` by exact transcript on a scripted engine: piped, in its line editor, and on a real terminal."""

from __future__ import annotations

import signal
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import PipeInput, create_pipe_input
from prompt_toolkit.output import DummyOutput

from edge_spec.cli.prompt import LinePrompt
from edge_spec.errors import BackendError, ContextLengthError
from edge_spec.types import FinishReason, SamplingParams
from tests.fake_engine import Answer, FakeEngine, FakeInfo, Transcript, run
from tests.pseudo_terminal import Terminal

SETUP = "big + small · onnx · int4 · 2 threads"
BANNER = f"{SETUP} · window 4096 tokens · loaded in 1.5 s\n"
FIGURES = "50.0 tokens/s · 75% accepted · 2.50 tokens/step · first token 0.25 s · peak 1.50GiB"


def interrupt() -> None:
    signal.raise_signal(signal.SIGINT)


# Piped lines


def test_each_piped_line_is_a_turn_and_only_answers_are_on_stdout(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = FakeEngine(Answer(["fi", "rst"]), "second\n").install(monkeypatch)
    assert run("chat", stdin="one\n\n  \ntwo ü") == Transcript(0, "first\nsecond\n", f"{BANNER}{FIGURES}\n{FIGURES}\n")
    assert engine.turns == ["one", "two ü"]
    assert engine.closed


def test_no_input_is_a_chat_without_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeEngine().install(monkeypatch)
    assert run("chat") == Transcript(0, "", BANNER)


def test_chat_defaults_come_from_the_pair_and_the_user_overrides_them(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = FakeEngine("a").install(monkeypatch)
    run("chat", "--temperature", "0.2", "--seed", "3", "-n", "9", "--stop", "END", stdin="x")
    assert engine.options == [
        {
            "keep": None,
            "max_tokens": 9,
            "stop": ("END",),
            "reference": (),
            "sampling": SamplingParams(temperature=0.2, top_p=0.8, seed=3),
        }
    ]
    assert engine.chats[0].messages[0] == {"role": "system", "content": "You are scripted."}


def test_the_users_system_message_replaces_the_pairs_even_by_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = FakeEngine("a", "b").install(monkeypatch)
    run("chat", "--system", "Brief", stdin="x")
    run("chat", "--system", "", stdin="x")
    assert [chat.messages[0]["content"] for chat in engine.chats] == ["Brief", "x"]


def test_load_options_reach_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = FakeEngine().install(monkeypatch)
    run("chat", "--pair", "p", "--draft", "d", "--drafter", "lookup", "--ctx", "512", "--no-pad")
    assert engine.loaded_with == {
        "pair": "p",
        "target": None,
        "draft": "d",
        "backend": "auto",
        "draft_backend": None,
        "drafter": "lookup",
        "draft_tokens": None,
        "recipe": None,
        "threads": None,
        "n_ctx": 512,
        "ram": None,
        "pad_rows": False,
        "history": False,
        "kv": None,
    }


@pytest.mark.parametrize(
    "args", [("--drafter", "x"), ("--top-p", "2"), ("--stop", ""), ("--pair", "p", "--target", "t"), ("hello",)]
)
def test_bad_usage_exits_with_2_before_anything_loads(monkeypatch: pytest.MonkeyPatch, args: tuple[str, ...]) -> None:
    engine = FakeEngine().install(monkeypatch)
    assert run("chat", *args).code == 2
    assert engine.loaded_with is None


def test_notes_are_shown_once(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = (Answer(["a"], notes=("at load", "new")), Answer(["b"], notes=("at load", "new")))
    FakeEngine(*answers, info=FakeInfo(notes=["at load"])).install(monkeypatch)
    assert run("chat", stdin="x\ny").err == f"{BANNER}note: at load\n{FIGURES}\nnote: new\n{FIGURES}\n"


def test_reset_forgets_the_conversation_and_stats_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = FakeEngine(Answer(["a", "b"]), "c").install(monkeypatch)
    transcript = run("chat", stdin="x\ny\n/stats\n/reset\n/stats\n")
    setup = f"model: 40 steps, 80 drafted, 60 accepted (75%)\n{SETUP}\n"
    assert transcript == Transcript(
        0,
        "ab\nc\n",
        f"{BANNER}{FIGURES}\n{FIGURES}\n"
        f"answers: 2, tokens: 3; 11 of 4096 in the window\nlast answer: {FIGURES}\n{setup}"
        f"the conversation is forgotten\n"
        f"answers: 2, tokens: 3; 0 of 4096 in the window\n{setup}",
    )
    assert engine.chats[0].messages == [{"role": "system", "content": "You are scripted."}]


def test_quit_leaves_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = FakeEngine("a", "b").install(monkeypatch)
    assert run("chat", stdin="x\n/quit\ny\n").code == 0
    assert engine.turns == ["x"]


def test_help_names_every_command_and_key(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeEngine().install(monkeypatch)
    shown = run("chat", stdin="/help").err
    for word in ("/help", "/reset", "/stats", "/quit", "Alt-Enter", "backslash", "Ctrl-C", "Ctrl-D", "//"):
        assert word in shown


@pytest.mark.parametrize(
    ("line", "reason"), [("/clear", "unknown command /clear"), ("/reset all", "/reset takes no argument")]
)
def test_an_unknown_command_says_so_and_sends_nothing(monkeypatch: pytest.MonkeyPatch, line: str, reason: str) -> None:
    engine = FakeEngine().install(monkeypatch)
    transcript = run("chat", stdin=line)
    assert transcript == Transcript(
        0,
        "",
        f"{BANNER}{reason}, nothing was sent: /help lists the commands, //... sends a text that starts with /\n",
    )
    assert engine.turns == []


def test_two_slashes_send_one(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = FakeEngine("a").install(monkeypatch)
    run("chat", stdin="//etc/passwd is what?")
    assert engine.turns == ["/etc/passwd is what?"]


def test_a_prompt_that_does_not_fit_costs_its_turn_and_not_the_chat(monkeypatch: pytest.MonkeyPatch) -> None:
    error = ContextLengthError(5000, 4096)
    FakeEngine(Answer(error=error), "fine").install(monkeypatch)
    assert run("chat", stdin="long\nshort\n") == Transcript(
        1,
        "fine\n",
        f"{BANNER}error: {error}\n/reset forgets the conversation and frees the window\n{FIGURES}\n",
    )


def test_a_failed_answer_keeps_its_text_and_makes_the_exit_code_1(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeEngine(Answer(["half"], error=BackendError("bad")), "whole").install(monkeypatch)
    transcript = run("chat", stdin="x\ny\n")
    assert transcript == Transcript(1, "half\nwhole\n", f"{BANNER}error: bad\n{FIGURES}\n")


def test_a_full_window_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeEngine(Answer(["cut"], finish=FinishReason.CONTEXT_FULL)).install(monkeypatch)
    assert run("chat", stdin="x").err == (
        f"{BANNER}{FIGURES} · finished: context_full\n"
        "the window of 4096 tokens is full, so the answer ends here: "
        "/reset starts over, --ctx gives a larger window\n"
    )


def test_ctrl_c_ends_a_piped_chat_with_130_and_keeps_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = FakeEngine(Answer(["one", interrupt, "two"]), "never").install(monkeypatch)
    transcript = run("chat", stdin="x\ny\n")
    assert transcript == Transcript(130, "one\n", f"{BANNER}{FIGURES} · finished: cancelled\n")
    assert engine.turns == ["x"]


def test_a_line_that_is_no_text_is_bad_usage(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeEngine("a").install(monkeypatch)
    transcript = run("chat", stdin=b"good\n\xff\n")
    assert (transcript.code, transcript.out) == (2, "a\n")
    assert "line 2" in transcript.err


# The line editor


@contextmanager
def typing(path: Path) -> Iterator[tuple[PipeInput, Iterator[str]]]:
    with create_pipe_input() as keys, create_app_session(input=keys, output=DummyOutput()):
        yield keys, iter(LinePrompt(path))


ALT_ENTER = "\x1b\r"


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("hello\r", "hello"),
        (f"a{ALT_ENTER}b\r", "a\nb"),
        ("a\\\rb\\\r\rx", "a\nb\n"),
        ("a\\b\r", "a\\b"),
        ("\x1b[200~a\nb\x1b[201~\r", "a\nb"),
        ("junk\x03clean\r", "clean"),
    ],
    ids=["enter", "alt-enter", "backslash", "inner backslash", "paste", "ctrl-c"],
)
def test_the_keys_make_the_message(tmp_path: Path, typed: str, message: str) -> None:
    with typing(tmp_path / "history") as (keys, messages):
        keys.send_text(typed)
        assert next(messages) == message


def test_ctrl_c_on_an_empty_line_names_the_way_out_and_ctrl_d_is_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with typing(tmp_path / "history") as (keys, messages):
        keys.send_text("\x03")
        keys.send_text("on\r")
        assert next(messages) == "on"
        assert capsys.readouterr().err == "Ctrl-D or /quit leaves\n"
        keys.send_text("\x04")
        assert list(messages) == []


def test_history_survives_the_session_and_is_private(tmp_path: Path) -> None:
    path = tmp_path / "cache" / "history"
    with typing(path) as (keys, messages):
        keys.send_text(f"two{ALT_ENTER}lines\r")
        next(messages)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.chmod(0o644)
    with typing(path) as (keys, messages):
        keys.send_text("\x1b[A\r")
        assert next(messages) == "two\nlines"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_history_that_cannot_be_kept_is_said_and_costs_nothing_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    with typing(blocked / "history") as (keys, messages):
        assert "note: the history of this session is not kept" in capsys.readouterr().err
        keys.send_text("x\r")
        assert next(messages) == "x"


# A real terminal


@pytest.mark.skipif(sys.platform == "win32", reason="pseudo-terminals are POSIX")
def test_on_a_terminal_ctrl_c_stops_the_answer_and_keeps_the_session(tmp_path: Path) -> None:
    script = """
        import time
        import pytest
        from tests.fake_engine import Answer, FakeEngine
        from edge_spec.cli import main

        def until_cancelled():
            while not engine.streams[-1].cancelled:
                time.sleep(0.01)

        engine = FakeEngine(Answer(["begin", until_cancelled, "NEVER"]), "answer to {}")
        engine.install(pytest.MonkeyPatch())
        main(["chat"])
    """
    with Terminal(script, tmp_path) as terminal:
        banner = terminal.expect("Ctrl-D leaves\n")
        assert BANNER.strip() in banner
        terminal.expect(">")
        terminal.type("first\r")
        terminal.expect("begin")
        terminal.type("unseen\r\x03")
        assert terminal.expect(f"{FIGURES} · finished: cancelled") == "\n"
        terminal.expect(">")
        terminal.type("half a line\x03second\r")
        terminal.expect("answer to {}\n")
        terminal.expect(FIGURES)
        terminal.expect(">")
        terminal.type("/stats\r")
        terminal.expect("answers: 2, tokens: 2")
        terminal.expect(">")
        terminal.type("\x04")
        assert terminal.wait() == 0
    assert "second" in (tmp_path / "cache" / "chat_history").read_text()


def test_a_chat_copies_from_files_that_were_given_before_or_on_the_way(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    engine = FakeEngine("a", "b", "c").install(monkeypatch)
    (tmp_path / "one.txt").write_text("first", "utf-8")
    (tmp_path / "two words.txt").write_text("second", "utf-8")
    lines = f"x\n/reference {tmp_path}/two words.txt\ny\n/reference nowhere.txt\n/reference\nz\n"
    transcript = run("chat", "--reference", str(tmp_path / "one.txt"), stdin=lines)
    assert [options["reference"] for options in engine.options] == [
        ("first",),
        ("first", "second"),
        ("first", "second"),
    ]
    assert f"answers may copy from {tmp_path}/two words.txt\n" in transcript.err
    assert "error: the reference nowhere.txt cannot be read" in transcript.err
    assert "/reference takes a FILE" in transcript.err


def test_a_chat_whose_drafter_copies_from_no_reference_takes_none(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = FakeEngine("a").install(monkeypatch)
    transcript = run("chat", "--drafter", "lookup", stdin="/reference some.txt\nx")
    assert "--drafter auto does" in transcript.err
    assert engine.options[0]["reference"] == ()
