from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from edge_spec import cli
from edge_spec.cli.console import byte_progress, error_boundary
from edge_spec.errors import EdgeSpecError, IntegrityError, UsageError
from edge_spec.sizes import format_size
from edge_spec.store import LocalModel, Store
from tests.store_fixtures import CONTENT

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    monkeypatch.setenv("EDGE_SPEC_HOME", str(tmp_path))
    monkeypatch.delenv("EDGE_SPEC_DEBUG", raising=False)

    def run(*args: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            cli.main(args)
        captured = capsys.readouterr()
        return int(caught.value.code or 0), captured.out, captured.err

    return run


def test_help_and_version_are_done(run: Run) -> None:
    code, out, _ = run("-h")
    assert code == 0
    assert all(command in out for command in ("pull", "models", "rm"))
    code, out, _ = run("--version")
    assert (code, out.split()[0]) == (0, "edge-spec")


@pytest.mark.parametrize("args", [["pull", "--no-such-option"], ["no-such-command"], ["rm"]])
def test_bad_usage_exits_with_2(run: Run, args: list[str]) -> None:
    code, out, err = run(*args)
    assert (code, out) == (2, "")
    assert err


@pytest.mark.parametrize(
    ("error", "code"), [(EdgeSpecError("why"), 1), (IntegrityError("why"), 1), (UsageError("why"), 2)]
)
def test_our_errors_are_one_line_and_an_exit_code(
    error: EdgeSpecError, code: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("EDGE_SPEC_DEBUG", raising=False)
    with pytest.raises(SystemExit) as caught, error_boundary():
        raise error
    assert caught.value.code == code
    assert capsys.readouterr().err == "error: why\n"


@pytest.mark.parametrize(("error", "told"), [(OSError(28, "No space"), "No space"), (MemoryError(), "memory")])
def test_what_the_system_refuses_is_one_line_too(
    error: Exception, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught, error_boundary():
        raise error
    assert caught.value.code == 1
    err = capsys.readouterr().err
    assert told in err
    assert err.count("\n") == 1


def test_the_debug_variable_adds_the_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGE_SPEC_DEBUG", "1")
    with pytest.raises(SystemExit), error_boundary():
        raise EdgeSpecError("why")
    assert "Traceback" in capsys.readouterr().err


def test_an_interrupt_exits_with_130(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Store, "pull", interrupt)
    assert run("pull", "smollm2-135m")[0] == 130


def test_models_lists_what_is_known(run: Run) -> None:
    code, out, err = run("models")
    assert (code, err) == (0, "")
    (line,) = [line for line in out.splitlines() if line.startswith("smollm2-135m")]
    assert line.split() == ["smollm2-135m", "no", "93.8MiB", "-", "Apache-2.0"]
    assert "pair qwen2.5-coder: target qwen2.5-coder-1.5b" in out


def test_models_json_is_one_object_and_nothing_else(run: Run) -> None:
    code, out, err = run("models", "--json")
    assert (code, err) == (0, "")
    listed = json.loads(out)
    assert listed.keys() == {"models", "pairs", "other_exports_bytes"}
    model = next(m for m in listed["models"] if m["name"] == "smollm2-135m")
    assert model == {
        "name": "smollm2-135m",
        "known": True,
        "present": False,
        "size_bytes": 98_362_432,
        "licence": "Apache-2.0",
        "architecture": "llama",
        "partial_bytes": 0,
        "exports_bytes": 0,
        "path": None,
    }


@pytest.mark.parametrize(
    ("args", "pulled"),
    [
        (["smollm2-135m"], ["smollm2-135m"]),
        (["qwen2.5-coder"], ["qwen2.5-coder-1.5b", "qwen2.5-coder-0.5b"]),
        ([], ["qwen2.5-coder-1.5b", "qwen2.5-coder-0.5b"]),
    ],
)
def test_pull_takes_a_model_or_both_of_a_pair(
    run: Run, monkeypatch: pytest.MonkeyPatch, args: list[str], pulled: list[str]
) -> None:
    asked: list[str] = []

    def pull(self: Store, ref: str, **options: object) -> LocalModel:
        asked.append(ref)
        return LocalModel(ref, Path(ref), "", None)

    monkeypatch.setattr(Store, "pull", pull)
    assert run("pull", *args)[0] == 0
    assert asked == pulled


def test_pulling_an_unknown_name_fails_with_a_hint(run: Run) -> None:
    code, out, err = run("pull", "smollm")
    assert (code, out) == (1, "")
    assert "smollm2-135m" in err
    assert "Traceback" not in err


def test_rm_tells_what_it_freed_and_fails_if_there_is_nothing(run: Run, tmp_path: Path) -> None:
    partial = tmp_path / "models" / "smollm2-135m" / "SmolLM2-135M-Instruct.Q4_1.gguf.partial"
    partial.parent.mkdir(parents=True)
    partial.write_bytes(CONTENT)
    code, out, err = run("rm", "smollm2-135m")
    assert (code, out) == (0, "")
    assert "10.0KiB freed" in err
    assert run("rm", "smollm2-135m")[0] == 1
    assert run("rm", "qwen2.5-coder")[0] == 1


def test_progress_off_a_terminal_is_lines_on_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    with byte_progress("tiny") as (progress, note):
        for done in range(0, 1025, 64):
            progress(done, 1024)
        progress(1024, 1024)
        note("a note")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "tiny: 1.00KiB of 1.00KiB (100%)\na note\n"


def test_progress_on_a_terminal_is_a_bar_beside_notes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    with byte_progress("tiny") as (progress, note):
        progress(512, 1024)
        note("a [bold]note[/bold]")
        progress(1024, 1024)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "tiny" in captured.err
    assert "a [bold]note[/bold]" in captured.err


def test_help_imports_no_heavy_library() -> None:
    script = (
        "import sys, edge_spec.cli\n"
        "heavy = {'onnxruntime', 'onnx', 'gguf', 'tokenizers', 'sentencepiece', 'huggingface_hub', 'llama_cpp',\n"
        "         'jinja2', 'prompt_toolkit', 'torch', 'transformers'}\n"
        "print(sorted(heavy & sys.modules.keys()))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=Path(cli.__file__).parents[2]
    )
    assert done.stdout == "[]\n"


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [
        (0, "0B"),
        (1023, "1023B"),
        (1024, "1.00KiB"),
        (10 << 10, "10.0KiB"),
        ((1 << 20) - 1, "1.00MiB"),
        (98_362_432, "93.8MiB"),
        (1_117_320_768, "1.04GiB"),
        (5 << 40, "5.00TiB"),
        (5000 << 40, "5000.0TiB"),
    ],
)
def test_sizes_are_binary(n_bytes: int, text: str) -> None:
    assert format_size(n_bytes) == text
