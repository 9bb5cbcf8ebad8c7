"""From a GGUF to a GGUF of another type, by llama.cpp's own quantiser."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from edge_spec.errors import (
    BackendError,
    BackendUnavailableError,
    ModelFormatError,
    StorageError,
    UnsupportedArchitectureError,
    UsageError,
)
from edge_spec.export import requantize_child
from edge_spec.export.folder import REMEDY
from edge_spec.formats.gguf import GGUFFile

GGUF_TYPES = {
    "Q4_0": 4.6, "Q4_1": 5.1, "Q5_0": 5.6, "Q5_1": 6.1, "Q8_0": 8.5, "Q2_K": 3.4, "Q3_K_S": 3.7, "Q3_K_M": 4.1,
    "Q3_K_L": 4.4, "Q4_K_S": 4.8, "Q4_K_M": 5.2, "Q5_K_S": 5.7, "Q5_K_M": 5.9, "Q6_K": 6.6, "IQ4_NL": 4.7,
    "IQ4_XS": 4.5, "F16": 16.0, "BF16": 16.0, "F32": 32.0,
}  # fmt: skip
"""File types that need no calibration, with the most bits that a weight takes: llama.cpp stores some tensors finer."""

DEFAULT_TYPE = "Q4_0"
"""llama.cpp's kernels for it work on tiles of four rows, which is what checking drafts needs."""

TensorProgress = Callable[[int, int], object]
"""Called as `progress(done, total)` in tensors."""


def check_type(name: str) -> str:
    """The type's name as llama.cpp writes it; UsageError lists those there are."""
    if name.upper() not in GGUF_TYPES:
        raise UsageError(f"no GGUF type {name!r}; there are {', '.join(GGUF_TYPES)}")
    return name.upper()


def requantize(
    source: Path,
    out: Path,
    file_type: str,
    *,
    pure: bool = False,
    threads: int | None = None,
    progress: TensorProgress | None = None,
) -> None:
    """Write `source` as the file `out` of a type in `GGUF_TYPES`; with `pure` all matrices are of that type.

    `out` appears whole or not at all. Quantised tensors are quantised once more, which costs quality: start from the
    finest file there is. Raises UsageError (an unknown type, `out` exists), BackendUnavailableError,
    ModelFormatError, UnsupportedArchitectureError, StorageError, BackendError.
    """
    file_type = check_type(file_type)
    if out.exists():
        raise UsageError(f"{out} exists already; remove it or name another file")
    if find_spec("llama_cpp") is None:
        raise BackendUnavailableError("GGUF files are made by llama-cpp-python: pip install 'edge-spec[llama]'")
    with GGUFFile(source) as gguf:
        n_weights = sum(tensor.n_elements for tensor in gguf.tensors.values())
        kept_bytes = gguf.metadata_span[1]
    partial = out.with_name(out.name + ".partial")
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
        partial.unlink(missing_ok=True)
        _check_room(partial.parent, int(n_weights * GGUF_TYPES[file_type] / 8) + kept_bytes)
        threads = threads or os.cpu_count() or 1
        _run(source, partial, number=_number(file_type), pure=pure, threads=threads, progress=progress)
        _check_whole(source, partial)
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        partial.rename(out)
    except OSError as exc:
        raise StorageError(f"{out} could not be written: {exc}; {REMEDY}") from exc
    finally:
        partial.unlink(missing_ok=True)


def _run(source: Path, out: Path, *, number: int, pure: bool, threads: int, progress: TensorProgress | None) -> None:
    script = str(Path(requantize_child.__file__))
    command = [sys.executable, "-P", script, str(source), str(out), str(number), str(int(pure)), str(threads)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as child:
        try:
            assert child.stdout is not None
            said: list[str] = []
            for line in map(str.strip, child.stdout):
                counts = line.split()
                if len(counts) == 2 and all(map(str.isdecimal, counts)):
                    if progress is not None:
                        progress(int(counts[0]), int(counts[1]))
                elif line:
                    said = [*said[-20:], line]
            code = child.wait()
        finally:
            child.kill()
    if code:
        raise _translated(source, said[-1].split(": ", 1)[-1] if said else f"it ended with code {code}")


def _translated(source: Path, reason: str) -> Exception:
    """llama.cpp's reason in this package's terms."""
    message = f"llama.cpp cannot requantise {source.name}: {reason}"
    if "unknown model architecture" in reason:
        return UnsupportedArchitectureError(message)
    if any(word in reason for word in ("basic_ios", "No space", "File too large", "iostream", "write")):
        return StorageError(f"{message} (the disk is full, or the file may not grow); {REMEDY}")
    if "memory" in reason or "bad_alloc" in reason:
        return BackendError(message)
    return ModelFormatError(message)


def _check_whole(source: Path, out: Path) -> None:
    """StorageError unless every tensor is in the new file: a stream that failed at its very end says nothing."""
    try:
        with GGUFFile(source) as old, GGUFFile(out) as new:
            missing = [name for name in old.tensors if name not in new.tensors]
    except ModelFormatError as exc:
        raise StorageError(f"llama.cpp left a file that is not whole ({exc}); {REMEDY}") from exc
    if missing:
        raise BackendError(f"llama.cpp left {missing[0]} out of {out.name}")


def _number(file_type: str) -> int:
    """`llama_ftype` of a type. Source: llama.h, through the gguf package's copy of it."""
    from gguf.constants import LlamaFileType

    prefix = "ALL" if file_type == "F32" else "MOSTLY"
    return int(LlamaFileType[f"{prefix}_{file_type}"])


def _check_room(folder: Path, needed_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise StorageError(
            f"the new file needs up to {needed_bytes >> 20} MiB on the disk of {folder}, "
            f"{free >> 20} are free; {REMEDY}"
        )
