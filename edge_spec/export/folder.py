"""The folder of an export: it appears whole or not at all, and its description says what whole is."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from edge_spec.errors import ModelFormatError, StorageError

DESCRIPTION = "edge_spec.json"

GRAPH_LAYOUT = "past-present"
"""The layout that the description of an export of optimum's graph names; other descriptions name none."""

REMEDY = "make room, or choose a folder (EDGE_SPEC_HOME) on a disk that has it and can be written"


def is_export(path: Path) -> bool:
    """Whether `path` is a folder that an exporter finished; what cannot be looked into is none."""
    try:
        return (path / DESCRIPTION).is_file()
    except OSError:
        return False


def describe(folder: Path, values: Mapping[str, Any]) -> None:
    """Write the description, last: `values`, and the sizes of the files that are there."""
    sizes = {file.name: file.stat().st_size for file in sorted(folder.iterdir())}
    (folder / DESCRIPTION).write_text(json.dumps({**values, "files": sizes}, indent=2) + "\n", "utf-8")


def read_description(path: Path) -> dict[str, Any]:
    """The description of an export; ModelFormatError where it cannot be read."""
    try:
        described = json.loads((path / DESCRIPTION).read_text("utf-8"))
    except (OSError, ValueError) as exc:
        raise ModelFormatError(f"{path} is not an export: {DESCRIPTION} cannot be read ({exc})") from exc
    if not isinstance(described, dict):
        raise ModelFormatError(f"{path / DESCRIPTION} is not complete: it holds no object")
    return described


def is_graph_export(described: Mapping[str, Any]) -> bool:
    """Whether a description is of an export in optimum's layout."""
    return described.get("layout") == GRAPH_LAYOUT


def check_files(path: Path, described: Mapping[str, Any], version: int) -> None:
    """ModelFormatError unless the export is of this version and its files have their sizes.

    KeyError, TypeError and AttributeError where the description is not complete.
    """
    made_by, files = described["exporter_version"], described["files"]
    if made_by != version:
        raise ModelFormatError(
            f"{path} was made by exporter version {made_by}, this is version {version}: export it again"
        )
    for name, n_bytes in files.items():
        if not (path / name).is_file() or (path / name).stat().st_size != n_bytes:
            raise ModelFormatError(f"{path / name} is missing or has not its {n_bytes} bytes: export it again")


@contextmanager
def new_folder(path: Path, needed_bytes: int) -> Iterator[Path]:
    """A folder beside `path` that takes its name once the body is done, and is removed if it fails.

    StorageError, with what the disk lacks, before anything is written or when the disk is full after all.
    """
    partial = path.with_name(path.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        _check_room(partial, needed_bytes)
        yield partial
        for file in partial.iterdir():
            with file.open("rb+") as handle:
                os.fsync(handle.fileno())
        partial.rename(path)
    except OSError as exc:
        shutil.rmtree(partial, ignore_errors=True)
        raise StorageError(f"the export could not be written to {path}: {exc}; {REMEDY}") from exc
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _check_room(folder: Path, needed_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise StorageError(
            f"the export needs {needed_bytes >> 20} MiB on the disk of {folder.parent}, {free >> 20} are free; {REMEDY}"
        )
