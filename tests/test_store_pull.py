from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from edge_spec.errors import DownloadError, IntegrityError, StorageError
from edge_spec.store.partial import Partial, SourceError
from tests.store_fixtures import CONTENT, Scripted, rest, store_with

ROOT = Path(__file__).parents[1]
HALF = len(CONTENT) // 2


def never(partial: Partial) -> None:
    raise AssertionError("this source must not be asked")


def refuse(partial: Partial) -> None:
    raise SourceError("nobody there")


def garbage(partial: Partial) -> None:
    partial.append(bytes(partial.missing))


def files_below(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"}


def test_a_pulled_model_is_verified_named_and_found_again(tmp_path: Path) -> None:
    store = store_with(tmp_path, Scripted(rest))
    seen: list[tuple[int, int]] = []
    model = store.pull("tiny", progress=lambda done, total: seen.append((done, total)))
    assert model.path.read_bytes() == CONTENT
    assert model.sha256 == hashlib.sha256(CONTENT).hexdigest()
    assert model == store.resolve("tiny")
    assert seen[-1] == (len(CONTENT), len(CONTENT))
    assert files_below(tmp_path) == {"tiny.gguf", "model.json"}


def test_a_present_model_asks_no_source(tmp_path: Path) -> None:
    store_with(tmp_path, Scripted(rest)).pull("tiny")
    notes: list[str] = []
    store_with(tmp_path, Scripted(never)).pull("tiny", note=notes.append)
    assert "already here" in notes[0]


def test_a_present_model_needs_no_folder_that_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pulled = store_with(tmp_path, Scripted(rest)).pull("tiny")

    def refuse_the_lock(*_: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("edge_spec.store.store.exclusive", refuse_the_lock)
    assert store_with(tmp_path, Scripted(never)).pull("tiny") == pulled
    with pytest.raises(StorageError, match="Read-only"):
        store_with(tmp_path, Scripted(never)).pull("tiny", verify=True)


def test_an_unreachable_source_falls_to_the_next_and_says_so(tmp_path: Path) -> None:
    notes: list[str] = []
    store_with(tmp_path, Scripted(refuse, "first"), Scripted(rest, "second")).pull("tiny", note=notes.append)
    assert notes == ["first: nobody there; trying second"]


def test_a_wrong_hash_falls_to_the_next_source_from_the_start(tmp_path: Path) -> None:
    sizes: list[int] = []

    def good(partial: Partial) -> None:
        sizes.append(partial.size)
        rest(partial)

    model = store_with(tmp_path, Scripted(garbage), Scripted(good)).pull("tiny")
    assert sizes == [0]
    assert model.path.read_bytes() == CONTENT


def test_only_wrong_bytes_is_an_integrity_error_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match="sha256"):
        store_with(tmp_path, Scripted(refuse), Scripted(garbage)).pull("tiny")
    assert files_below(tmp_path) == set()


def test_no_reachable_source_is_a_download_error_that_lists_each(tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match=r"(?s)first: nobody.*second: nobody"):
        store_with(tmp_path, Scripted(refuse, "first"), Scripted(refuse, "second")).pull("tiny")


def test_too_many_bytes_are_refused_before_they_are_written(tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match="more than"):
        store_with(tmp_path, Scripted(lambda partial: partial.append(CONTENT + b"!"))).pull("tiny")


def test_another_source_goes_on_where_one_broke(tmp_path: Path) -> None:
    def break_off(partial: Partial) -> None:
        partial.append(CONTENT[:HALF])
        raise SourceError("cut")

    sizes: list[int] = []

    def go_on(partial: Partial) -> None:
        sizes.append(partial.size)
        rest(partial)

    store_with(tmp_path, Scripted(break_off), Scripted(go_on)).pull("tiny")
    assert sizes == [HALF]


@pytest.mark.parametrize("left", [bytes(HALF), bytes(len(CONTENT)), bytes(len(CONTENT) + 1)])
def test_a_corrupt_remainder_is_found_and_fetched_anew_from_the_same_source(tmp_path: Path, left: bytes) -> None:
    partial = tmp_path / "models" / "tiny" / "tiny.gguf.partial"
    partial.parent.mkdir(parents=True)
    partial.write_bytes(left)
    assert store_with(tmp_path, Scripted(rest)).pull("tiny").path.read_bytes() == CONTENT


def test_a_whole_remainder_needs_no_source(tmp_path: Path) -> None:
    partial = tmp_path / "models" / "tiny" / "tiny.gguf.partial"
    partial.parent.mkdir(parents=True)
    partial.write_bytes(CONTENT)
    store_with(tmp_path, Scripted(never)).pull("tiny")


def test_a_whole_file_without_its_record_needs_no_source(tmp_path: Path) -> None:
    store_with(tmp_path, Scripted(rest)).pull("tiny")
    (tmp_path / "models" / "tiny" / "model.json").unlink()
    store_with(tmp_path, Scripted(never)).pull("tiny")


def test_verify_finds_flipped_bytes_and_fetches_again(tmp_path: Path) -> None:
    store = store_with(tmp_path, Scripted(rest))
    path = store.pull("tiny").path
    path.write_bytes(bytes(len(CONTENT)))
    assert store.pull("tiny", verify=True).path.read_bytes() == CONTENT


def test_a_cut_file_is_named_by_resolve_and_mended_by_pull(tmp_path: Path) -> None:
    store = store_with(tmp_path, Scripted(rest))
    store.pull("tiny").path.write_bytes(CONTENT[:HALF])
    with pytest.raises(IntegrityError, match="edge-spec pull tiny"):
        store.resolve("tiny")
    assert store.pull("tiny").path.read_bytes() == CONTENT


def test_too_little_disk_is_said_before_anything_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1 << 40, 1 << 40, 40 << 20))
    with pytest.raises(StorageError, match="EDGE_SPEC_HOME"):
        store_with(tmp_path, Scripted(never, scratch_bytes=30 << 20)).pull("tiny")
    store_with(tmp_path, Scripted(rest, scratch_bytes=20 << 20)).pull("tiny")


def test_a_full_disk_in_the_middle_is_a_download_error_and_keeps_what_came(tmp_path: Path) -> None:
    def fill(partial: Partial) -> None:
        partial.append(CONTENT[:HALF])
        raise OSError(28, "No space left on device")

    with pytest.raises(StorageError, match="No space left"):
        store_with(tmp_path, Scripted(fill), Scripted(never)).pull("tiny")
    assert (tmp_path / "models" / "tiny" / "tiny.gguf.partial").read_bytes() == CONTENT[:HALF]


def test_progress_that_returns_false_stops_and_keeps_what_came(tmp_path: Path) -> None:
    def in_two(partial: Partial) -> None:
        partial.append(CONTENT[:HALF])
        rest(partial)

    with pytest.raises(DownloadError, match="resumes"):
        store_with(tmp_path, Scripted(in_two), Scripted(never)).pull("tiny", progress=lambda *_: False)
    assert (tmp_path / "models" / "tiny" / "tiny.gguf.partial").stat().st_size == HALF


def other_process(tmp_path: Path) -> subprocess.Popen[str]:
    """A process in the middle of pulling the tiny model: half is there, the rest comes after a line of input."""
    script = (
        "import sys, pathlib\n"
        "from tests.store_fixtures import CONTENT, Scripted, rest, store_with\n"
        "def slowly(partial):\n"
        "    partial.append(CONTENT[:len(CONTENT) // 2])\n"
        "    partial._file.flush()\n"
        "    print('half', flush=True)\n"
        "    sys.stdin.readline()\n"
        "    rest(partial)\n"
        "store_with(pathlib.Path(sys.argv[1]), Scripted(slowly)).pull('tiny')\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "half\n"
    return process


def test_a_second_pull_waits_says_so_and_finds_the_model(tmp_path: Path) -> None:
    notes: list[str] = []
    with other_process(tmp_path) as process:

        def note(text: str) -> None:
            notes.append(text)
            if "waiting" in text and process.stdin is not None:
                process.stdin.write("\n")
                process.stdin.flush()

        model = store_with(tmp_path, Scripted(never)).pull("tiny", note=note)
        assert model.path.read_bytes() == CONTENT
        assert len(notes) == 2
        assert "waiting" in notes[0]
        assert "already here" in notes[1]
        process.communicate()
    assert process.returncode == 0


def test_a_model_that_is_being_pulled_is_not_removed(tmp_path: Path) -> None:
    with other_process(tmp_path) as process:
        with pytest.raises(DownloadError, match="another process"):
            store_with(tmp_path).remove("tiny")
        process.kill()
        process.communicate()


def test_after_kill_9_the_same_pull_completes_from_where_it_was(tmp_path: Path) -> None:
    with other_process(tmp_path) as process:
        process.kill()
        process.communicate()
    sizes: list[int] = []

    def go_on(partial: Partial) -> None:
        sizes.append(partial.size)
        rest(partial)

    assert store_with(tmp_path, Scripted(go_on)).pull("tiny").path.read_bytes() == CONTENT
    assert sizes == [HALF]
