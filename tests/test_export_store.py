"""The store's exports: made when they are needed, mended when they are damaged, and honest about the disk."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

from edge_spec.errors import StorageError
from edge_spec.export import RECIPES, ensure_export, export_model
from edge_spec.export.finished import SOURCE, WEIGHTS
from edge_spec.export.folder import DESCRIPTION, is_export
from tests.tiny_models import write_tiny_gguf

SHA = "ab" * 32


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return write_tiny_gguf(tmp_path / "tiny.gguf")


@pytest.mark.parametrize("name", [DESCRIPTION, WEIGHTS, SOURCE])
def test_a_damaged_export_of_the_store_is_made_anew(name: str, tiny: Path, tmp_path: Path) -> None:
    exports = tmp_path / "exports"
    whole = ensure_export(tiny, SHA, RECIPES["int4"], exports)
    with (whole.path / name).open("r+b") as file:
        file.truncate(10)
    assert ensure_export(tiny, SHA, RECIPES["int4"], exports) == whole


def _in_store(tiny: Path, folder: Path) -> None:
    ensure_export(tiny, SHA, RECIPES["int4"], folder)


def _to_folder(tiny: Path, folder: Path) -> None:
    export_model(tiny, RECIPES["int4"], folder / "out", sha256=SHA)


@pytest.mark.parametrize("export", [_in_store, _to_folder])
def test_a_folder_that_cannot_be_made_is_an_error_with_a_remedy(
    export: Callable[[Path, Path], None], tiny: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_bytes(b"in the way")
    with pytest.raises(StorageError, match="EDGE_SPEC_HOME"):
        export(tiny, tmp_path / "file" / "exports")


def test_who_waits_for_another_process_shows_it_and_makes_nothing_twice(tiny: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    waiting = threading.Event()

    def progress(done: int, total: int) -> None:
        seen.append((done, total))
        waiting.set()

    (tmp_path / SHA).mkdir()
    waits = threading.Thread(
        target=ensure_export, args=(tiny, SHA, RECIPES["int4"], tmp_path), kwargs={"progress": progress}
    )
    made = ensure_export(tiny, "cd" * 32, RECIPES["int4"], tmp_path)
    with FileLock(tmp_path / SHA / "lock"):
        waits.start()
        assert waiting.wait(10)
        made.path.rename(tmp_path / SHA / made.path.name)
    waits.join(10)
    assert seen == [(0, tiny.stat().st_size)]


@pytest.mark.parametrize("name", ["x" * 300, "nowhere", "file/inside"])
def test_what_cannot_be_looked_into_is_no_export(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    assert not is_export(tmp_path / name)
