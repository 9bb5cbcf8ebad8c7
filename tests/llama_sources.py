"""The vocabulary files, with expected ids, that the source package of llama-cpp-python carries."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory

_SEPARATOR = "\n__ggml_vocab_test__\n"


def vocabulary_folder(cache: Path) -> Path:
    """The folder of `ggml-vocab-*.gguf`, fetched through the user's pip the first time. Errors say what failed."""
    release = version("llama-cpp-python")
    folder = cache / f"llama-cpp-python-{release}-vocabularies"
    if not folder.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=cache) as scratch:
            _extract(_download(f"llama-cpp-python=={release}", Path(scratch)), Path(scratch) / "files")
            shutil.move(Path(scratch) / "files", folder)
    return folder


def expected(vocabulary: Path) -> list[tuple[str, list[int]]]:
    """Texts with the ids that llama.cpp's own tests expect; empty where a file has none."""
    texts = vocabulary.with_name(f"{vocabulary.name}.inp")
    if not texts.exists():
        return []
    ids = vocabulary.with_name(f"{vocabulary.name}.out").read_text().split("\n")
    lines = texts.read_bytes().decode().split(_SEPARATOR)
    return [(text, [int(i) for i in line.split()]) for text, line in zip(lines, ids, strict=True)]


def _download(requirement: str, folder: Path) -> Path:
    name = requirement.partition("==")[0]
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-cache-dir", f"--no-binary={name}"]
    done = subprocess.run(
        [*command, "--dest", str(folder), requirement], capture_output=True, text=True, check=False, timeout=900
    )
    archives = list(folder.glob("*.tar.gz"))
    if done.returncode or not archives:
        raise RuntimeError(
            f"pip could not fetch the source of {requirement}:\n{done.stdout[-1000:]}{done.stderr[-2000:]}"
        )
    return archives[0]


def _extract(archive: Path, folder: Path) -> None:
    folder.mkdir()
    with tarfile.open(archive) as tar:
        for member in tar:
            path = PurePosixPath(member.name)
            if member.isfile() and path.parts[1:-1] == ("vendor", "llama.cpp", "models") and "vocab" in path.name:
                source = tar.extractfile(member)
                assert source is not None
                (folder / path.name).write_bytes(source.read())
