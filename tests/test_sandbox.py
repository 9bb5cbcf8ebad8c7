from __future__ import annotations

import socket
import sys
from pathlib import Path

import pytest

from edge_spec.quality.sandbox import Limits, Verdict, run

QUICK = Limits(cpu_s=1, wall_s=5, memory_bytes=256 << 20)
linux = pytest.mark.skipif(sys.platform != "linux", reason="namespaces and Landlock are Linux's")


def _needs(verdict: Verdict, wall: str) -> None:
    if wall not in verdict.walls:
        pytest.skip(f"this kernel grants no {wall} wall to an ordinary process")


def test_a_program_that_runs_to_its_end_passes() -> None:
    assert run("assert sorted([2, 1]) == [1, 2]", QUICK).passed


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("assert 1 == 2, 'no'", "AssertionError: no"),
        ("def f(:", "SyntaxError"),
        ("raise SystemExit(0)", "before its last line"),
        ("import os; os._exit(0)", "before its last line"),
        ("while True: pass", "processor time"),
        ("x = bytearray(1 << 30)", "MemoryError"),
        ("open('big', 'wb').write(bytes(1 << 22))", "File too large"),
        ("import os; os.abort()", "SIGABRT"),
        ("input()", "EOF"),
    ],
)
def test_a_program_that_fails_or_exceeds_a_limit_does_not_pass_and_says_why(source: str, reason: str) -> None:
    verdict = run(source, QUICK)
    assert not verdict.passed
    assert reason in verdict.reason


def test_a_program_that_sleeps_is_ended() -> None:
    assert run("import time; time.sleep(60)", Limits(wall_s=0.5)).reason == "took too long"


def test_a_program_sees_no_environment_and_its_folder_is_thrown_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "swordfish")
    source = "import os; open('left', 'w').write('x'); assert 'SECRET' not in os.environ; print(os.getcwd()); 1 / 0"
    verdict = run(source.replace("1 / 0", "raise ValueError(os.getcwd())"), QUICK)
    folder = Path(verdict.reason.removeprefix("ValueError: "))
    assert folder.name.startswith("edge-spec-jail-")
    assert not folder.exists()


@linux
def test_a_program_reaches_no_network() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        verdict = run(f"import socket; socket.create_connection(('127.0.0.1', {port}), 2)", QUICK)
    _needs(verdict, "network")
    assert not verdict.passed


@linux
def test_a_program_writes_and_removes_nothing_outside_its_folder(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.write_text("as it was")
    for source in (
        f"open({str(kept)!r}, 'w')",
        f"import os; os.remove({str(kept)!r})",
        f"open({str(tmp_path / 'new')!r}, 'w')",
    ):
        verdict = run(source, QUICK)
        _needs(verdict, "files")
        assert not verdict.passed
    assert kept.read_text() == "as it was"
    assert [file.name for file in tmp_path.iterdir()] == ["kept"]


def test_much_output_is_not_kept() -> None:
    verdict = run("print('x' * 500_000); raise ValueError('the end')", QUICK)
    assert verdict.reason == "ValueError: the end"
