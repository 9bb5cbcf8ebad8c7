"""The Python environment that optimum runs in: its pins are older than ours, so it gets one of its own, made once."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from edge_spec.errors import BackendUnavailableError, StorageError
from edge_spec.store import pip_child
from edge_spec.store.pull import Note, exclusive

PACKAGES = ("optimum-onnx[onnxruntime]==0.1.0", "transformers==4.57.6", "torch==2.13.0", "safetensors", "sentencepiece")
"""What the environment holds: optimum-onnx 0.1.0 takes transformers below 4.58, and was tried with this torch."""

DOWNLOAD = "about 1 GB (several, where pip takes a build of torch with GPU libraries)"

_STAMP = "complete"
_CHECK = "import optimum.exporters.onnx, transformers, torch"


def find_python(chosen: Path | None) -> Path | None:
    """A Python that has optimum: the one that the user chose, or this one; None if this one has not.

    BackendUnavailableError where the chosen one has not.
    """
    if chosen is not None:
        path = Path(shutil.which(chosen.expanduser()) or chosen.expanduser())
        reason = _problem(path)
        if reason:
            raise BackendUnavailableError(
                f"{chosen} does not run optimum ({reason}); install {PACKAGES[0]!r} and torch there, or drop "
                f"--optimum-python"
            )
        return path
    from importlib import metadata

    try:
        metadata.version("optimum-onnx"), metadata.version("torch")
    except metadata.PackageNotFoundError:
        return None
    return Path(sys.executable)


def ensure_environment(cache_dir: Path, note: Note) -> Path:
    """The Python of the environment below `cache_dir`, made now if there is none.

    `note` gets what is fetched before it is, and each large package. Raises BackendUnavailableError with pip's reason,
    StorageError where the folder cannot be written.
    """
    identity = json.dumps([PACKAGES, sys.version_info[:2]])
    folder = cache_dir / "environments" / f"optimum-{hashlib.sha256(identity.encode()).hexdigest()[:8]}"
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    try:
        with exclusive(folder.with_suffix(".lock"), note, "optimum's packages"):
            if (folder / _STAMP).is_file() and python.is_file():
                return python
            shutil.rmtree(folder, ignore_errors=True)
            note(f"making an environment for optimum in {folder}: pip fetches {DOWNLOAD}, once")
            _run([sys.executable, "-m", "venv", str(folder)], note)
            install = ["install", "--progress-bar", "off", "--disable-pip-version-check", *PACKAGES]
            _run([str(python), "-P", str(Path(pip_child.__file__)), *install], note)
            (folder / _STAMP).write_text(identity + "\n", "utf-8")
            return python
    except OSError as exc:
        raise StorageError(f"the environment for optimum could not be made in {folder}: {exc}") from exc
    finally:
        if not (folder / _STAMP).is_file():
            shutil.rmtree(folder, ignore_errors=True)


def _run(command: Sequence[str], note: Note) -> None:
    """Run a step, passing on what it fetches; BackendUnavailableError with its last error if it fails."""
    lines: list[str] = []
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as child:
        try:
            assert child.stdout is not None
            for line in map(str.strip, child.stdout):
                lines = [*lines[-40:], line]
                if line.startswith(("Downloading ", "Installing ")):
                    note(line if len(line) <= 100 else f"{line[:97]}...")
            code = child.wait()
        finally:
            child.kill()
    if code:
        errors = [line for line in lines if line.startswith("ERROR:")] or lines or ["it gave no reason"]
        raise BackendUnavailableError(
            f"optimum's packages could not be installed: {errors[0].removeprefix('ERROR: ')}; repeat with a network, "
            f"or name a Python that has them with --optimum-python"
        )


def _problem(python: Path) -> str:
    """Why a Python cannot run optimum; empty if it can."""
    try:
        done = subprocess.run(
            [python, "-P", "-c", _CHECK], capture_output=True, text=True, errors="replace", check=False
        )
    except OSError as exc:
        return exc.strerror or str(exc)
    return "" if done.returncode == 0 else (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
