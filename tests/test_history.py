"""The answers of the past: the file survives crashes and company, and stays small and private."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from edge_spec.answer_file import AnswerFile
from edge_spec.decoding.drafter import Request
from edge_spec.drafting import HistoryDrafter, PastAnswers
from edge_spec.errors import StorageError
from edge_spec.types import SamplingParams
from tests.fake_engine import Transcript, run

ANSWERS = [list(range(10)), [7] * 20, list(range(100, 150))]


@pytest.fixture
def file(tmp_path: Path) -> AnswerFile:
    return AnswerFile(tmp_path / "history" / "v.ids")


def kept(file: AnswerFile) -> list[list[int]]:
    return [ids.tolist() for ids in file.read()]


def filled(file: AnswerFile) -> AnswerFile:
    for answer in ANSWERS:
        file.append(answer)
    return file


# ---- the file


def test_answers_are_kept_in_order_and_the_same_one_once(file: AnswerFile) -> None:
    assert kept(file) == []
    filled(file).append(ANSWERS[0])
    assert kept(AnswerFile(file.path)) == ANSWERS


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has other permissions")
def test_only_the_user_may_read_it(file: AnswerFile) -> None:
    filled(file)
    assert file.path.parent.stat().st_mode & 0o777 == 0o700
    file.path.chmod(0o644)
    file.append([1, 2, 3])
    modes = {path.name: path.stat().st_mode & 0o777 for path in file.path.parent.iterdir()}
    assert modes["v.ids"] == 0o600
    assert set(modes.values()) == {0o600}


def test_it_never_grows_beyond_its_bound_and_keeps_the_newest(tmp_path: Path) -> None:
    file = AnswerFile(tmp_path / "v.ids", max_bytes=2000)
    for i in range(300):
        file.append([i] * (i % 40 + 1))
        assert file.path.stat().st_size <= 2000
        assert kept(file)[-1] == [i] * (i % 40 + 1)
    assert len(kept(file)) > 5
    file.append(range(10_000))
    assert kept(file)[-1][-1] == 9_999
    assert file.path.stat().st_size <= 2000


def test_wherever_a_crash_cuts_the_file_the_whole_answers_stay_and_it_can_be_written(file: AnswerFile) -> None:
    data = filled(file).path.read_bytes()
    for length in range(len(data)):
        file.path.write_bytes(data[:length])
        whole = kept(file)
        assert whole == ANSWERS[: len(whole)]
        assert len(whole) < len(ANSWERS)
        if length % 7 == 0:
            file.append([5, 6])
            assert kept(file) == [*whole, [5, 6]]


def test_bytes_that_are_not_what_was_written_are_not_believed(file: AnswerFile) -> None:
    data = filled(file).path.read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(200):
        damaged = bytearray(data)
        damaged[rng.integers(len(data))] ^= 1 << rng.integers(8)
        file.path.write_bytes(damaged)
        whole = kept(file)
        assert whole == ANSWERS[: len(whole)]
    file.path.write_bytes(b"something else")
    file.append([5, 6])
    assert kept(file) == [[5, 6]]


def test_clearing_leaves_nothing_to_read(file: AnswerFile) -> None:
    data = filled(file).path.read_bytes()
    file.path.with_name("v.ids.partial").write_bytes(data)
    file.clear()
    assert kept(file) == []
    assert [path for path in file.path.parent.iterdir() if path.stat().st_size] == []
    file.clear()


_WRITER = """
import sys
from pathlib import Path
from edge_spec.answer_file import AnswerFile
file, number, count = AnswerFile(Path(sys.argv[1]), max_bytes=int(sys.argv[4])), int(sys.argv[2]), int(sys.argv[3])
print("ready", flush=True)
for i in range(count):
    file.append([number, i] * 30)
"""


def writer(file: AnswerFile, number: int, count: int, max_bytes: int) -> subprocess.Popen[str]:
    arguments = [str(file.path), str(number), str(count), str(max_bytes)]
    return subprocess.Popen([sys.executable, "-c", _WRITER, *arguments], stdout=subprocess.PIPE, text=True)


def test_processes_that_write_at_once_lose_nothing(file: AnswerFile) -> None:
    processes = [writer(file, number, 25, 1 << 20) for number in range(3)]
    for process in processes:
        process.communicate()
        assert process.returncode == 0
    answers = kept(file)
    assert sorted(answers) == sorted([number, i] * 30 for number in range(3) for i in range(25))
    for number in range(3):
        assert [answer[1] for answer in answers if answer[0] == number] == list(range(25))


def test_a_writer_that_is_killed_leaves_a_file_that_can_be_used(file: AnswerFile) -> None:
    """The bound is small, so that the file is made anew all the time too."""
    for round_number in range(3):
        with writer(file, round_number, 1_000_000, 4000) as process:
            assert process.stdout is not None
            process.stdout.readline()
            while not any(answer[0] == round_number for answer in kept(file)):
                time.sleep(0.001)
            time.sleep(0.01 * (1 + round_number))
            os.kill(process.pid, signal.SIGTERM if sys.platform == "win32" else signal.SIGKILL)
        answers = kept(file)
        assert answers
        assert all(answer in (answer[:2] * 30, answer[:2]) for answer in answers)
        file.append([round_number, 9])
        assert kept(file)[-1] == [round_number, 9]


def test_a_path_that_cannot_be_used_is_our_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    file = AnswerFile(tmp_path / "file" / "v.ids")
    for use in (file.read, lambda: file.append([1, 2]), file.clear):
        with pytest.raises(StorageError, match="cannot be used"):
            use()


# ---- drafting


def request(**sampling: float) -> Request:
    return Request(
        sampling=SamplingParams(**sampling),  # type: ignore[arg-type]
        rng=np.random.default_rng(0),
        prompt_length=1,
        max_length=100,
        n_vocab=200,
    )


def test_old_and_new_answers_are_copied_and_the_new_ones_count_more(file: AnswerFile) -> None:
    past = PastAnswers(filled(file))
    drafter = HistoryDrafter(past)
    drafter.start(request())
    assert drafter.propose([0, 103, 104, 105, 106], 9).tokens == [107, 108, 109, 110]
    assert drafter.propose([0, 0, 8, 9], 9).tokens == [], "two tokens are not enough"
    past.add([103, 104, 105, 1, 2, 3, 4, 5])
    drafter.start(request())
    assert drafter.propose([0, 103, 104, 105], 9).tokens == [1, 2, 3]
    assert kept(file)[-1] == [103, 104, 105, 1, 2, 3, 4, 5]


def test_the_file_is_read_at_the_first_use_and_once(file: AnswerFile) -> None:
    past = PastAnswers(file)
    filled(file)
    old = past.corpora()[0]
    assert len(old) == sum(map(len, ANSWERS)) + len(ANSWERS)
    assert past.corpora()[0] is old


def test_short_answers_are_not_kept(file: AnswerFile) -> None:
    past = PastAnswers(file)
    past.add([1, 2, 3])
    past.add(range(8))
    past.add(range(8))
    assert kept(file) == [list(range(8))]


def test_the_same_seed_gives_the_same_text_whatever_is_in_the_history(file: AnswerFile) -> None:
    """At a temperature drafts use up random numbers, so a history would change what a seed writes."""
    drafter = HistoryDrafter(PastAnswers(filled(file)))
    context = [0, 103, 104, 105, 106]
    drafter.start(request(temperature=1.0, seed=3))
    assert drafter.propose(context, 9).tokens == []
    for sampling in ({"temperature": 1.0}, {"seed": 3}):
        drafter.start(request(**sampling))
        assert drafter.propose(context, 9).tokens


def test_a_file_that_cannot_be_used_is_told_and_forgotten(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    past = PastAnswers(AnswerFile(tmp_path / "file" / "v.ids"))
    past.corpora()
    past.add(range(8))
    assert len(past.take_problems()) == 2
    past.corpora()
    assert past.take_problems() == []
    assert past.corpora()[1].find([3, 4, 5])[1] == 3, "this process still remembers"


# ---- the command


def test_the_command_counts_and_clears(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGE_SPEC_HOME", str(tmp_path))
    folder = tmp_path / "history"
    assert run("history") == Transcript(0, f"0 answers, 0 tokens, 0B in {folder}\n", "")
    assert run("history", "--clear") == Transcript(0, "", "there was no history\n")
    for name in ("one.ids", "two.ids"):
        filled(AnswerFile(folder / name))
    assert run("history", "--stat").out == f"6 answers, 160 tokens, 728B in {folder}\n"
    assert run("history", "--clear") == Transcript(0, "", "the history is empty\n")
    assert run("history").out.startswith("0 answers, 0 tokens")
    assert run("history", "--stat", "--clear").code == 2
