"""Compile the kernels for the processor at hand, once, and keep the library in the cache folder."""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from filelock import FileLock

from edge_spec.errors import BackendUnavailableError
from edge_spec.kernels.check import find_fault
from edge_spec.kernels.library import open_library
from edge_spec.processor import cpu_key

_SOURCES = ("pass.c", "products.h", "activations.h", "attention.h", "vectors.h")
_HERE = Path(__file__).parent
_FLAGS = ("-std=gnu11", "-O3", "-fno-math-errno", "-ffp-contract=off", "-shared")
"""Contraction is off since a compiler may contract one copy of a loop and not the other, and rows would differ."""
_PORTABLE = "-DEDGE_SPEC_PORTABLE"
_PATIENCE_S = 900
"""A first build on Windows makes parts of its C library too."""
_ZIG = (sys.executable, "-m", "ziglang", "cc")
INSTALL = 'pip install "edge-spec[native]", which brings a compiler'


_loaded: dict[tuple[Path, tuple[str, ...]], Any] = {}
"""The libraries of this process, by folder and compiler."""


def load_library(folder: Path, on_compile: Callable[[], None] | None = None) -> Any:
    """The kernels for this processor, compiled into `folder` if they are not there yet; `on_compile` is told before.

    Instructions that give other results here than they should are done without. Raises BackendUnavailableError where
    there is no compiler, or it fails.
    """
    key = (folder.resolve(), tuple(find_compiler()))
    if key not in _loaded:
        _loaded[key] = _load(*key, on_compile)
    return _loaded[key]


def find_compiler() -> list[str]:
    """The command of a C compiler: what CC names, the one of the `native` extra, or the system's.

    Raises BackendUnavailableError where there is none.
    """
    if os.environ.get("CC"):
        try:
            return shlex.split(os.environ["CC"], posix=sys.platform != "win32")
        except ValueError as exc:
            raise BackendUnavailableError(f"CC={os.environ['CC']!r} is no command: {exc}") from exc
    if find_spec("ziglang") is not None:
        return list(_ZIG)
    for name in ("cc", "gcc", "clang"):
        if found := shutil.which(name):
            return [found]
    raise BackendUnavailableError(f"the native backend needs a C compiler, and there is none: {INSTALL}")


def source_key() -> str:
    """What the kernels' speed depends on besides the processor: their source and the compiler, as eight hex digits.

    Raises BackendUnavailableError where there is no compiler.
    """
    return _key(tuple(find_compiler()))[:8]


@cache
def _key(compiler: tuple[str, ...]) -> str:
    told = [_named(compiler), *_FLAGS, *((_HERE / name).read_text("utf-8") for name in _SOURCES)]
    return hashlib.sha256("\0".join(told).encode()).hexdigest()


def _named(compiler: tuple[str, ...]) -> str:
    """A compiler and its version; where its interpreter lies does not matter."""
    if compiler == _ZIG:
        with suppress(metadata.PackageNotFoundError):
            return f"ziglang {metadata.version('ziglang')}"
    with suppress(OSError, subprocess.SubprocessError):
        asked = subprocess.run(
            [*compiler, "--version"], capture_output=True, stdin=subprocess.DEVNULL, timeout=_PATIENCE_S, check=False
        )
        return f"{' '.join(compiler)} {asked.stdout.decode(errors='replace')}"
    return " ".join(compiler)


def _load(folder: Path, compiler: tuple[str, ...], on_compile: Callable[[], None] | None) -> Any:
    name = hashlib.sha256(f"{cpu_key()} {_key(compiler)}".encode()).hexdigest()[:16]
    try:
        if (kept := _kept(folder, name)) is not None:
            return kept  # of a folder that cannot be written too
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f"{name}.lock"):
            if (kept := _kept(folder, name)) is not None:
                return kept
            if on_compile is not None:
                on_compile()
            return _build(folder, name)
    except OSError as exc:
        raise BackendUnavailableError(f"the native backend's kernels cannot be kept in {folder}: {exc}") from exc


def _kept(folder: Path, name: str) -> Any | None:
    """The library that an earlier run made, if it is whole: to open one that is cut short can end the process."""
    for path in folder.glob(f"{name}-*{_suffix()}"):
        if path.stem == f"{name}-{_sum(path)}":
            with suppress(OSError):
                return open_library(path)
    return None


def _sum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _build(folder: Path, name: str) -> Any:
    """Compile, check, and only then give the library its name, its sum in it."""
    for stale in folder.glob(f"{name}.scratch-*"):  # of a build that was killed
        shutil.rmtree(stale, ignore_errors=True)
    # A name of its own each time: a library that is open already is found again by its name.
    with tempfile.TemporaryDirectory(prefix=f"{name}.scratch-", dir=folder, ignore_cleanup_errors=True) as scratch:
        faults: list[str] = []
        for more in ((), (_PORTABLE,)):
            made = Path(scratch) / f"kernels{len(faults)}{_suffix()}"
            _compile(made, Path(scratch), more)
            library = open_library(made)
            fault = find_fault(library)
            if fault is None:
                for damaged in folder.glob(f"{name}-*{_suffix()}"):
                    damaged.unlink()
                made.replace(folder / f"{name}-{_sum(made)}{_suffix()}")
                return library
            faults.append(fault)
    raise BackendUnavailableError(f"the native backend's kernels give wrong results here: {'; '.join(faults)}")


def _compile(made: Path, scratch: Path, more: tuple[str, ...]) -> None:
    native = "-march=native" if platform.machine().lower() in ("x86_64", "amd64") else "-mcpu=native"
    position = () if sys.platform == "win32" else ("-fPIC",)
    command = [*find_compiler(), *_FLAGS, native, *position, *more, str(_HERE / "pass.c"), "-o", str(made)]
    kept = {name: str(scratch / "zig") for name in ("ZIG_GLOBAL_CACHE_DIR", "ZIG_LOCAL_CACHE_DIR")}
    try:
        done = subprocess.run(
            command + ([] if sys.platform == "win32" else ["-lm"]),
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_PATIENCE_S,
            env=os.environ | kept,
            stdin=subprocess.DEVNULL,
            check=False,
        )
    except (OSError, subprocess.SubprocessError) as exc:
        raise BackendUnavailableError(f"the native backend's kernels were not compiled: {exc}; {INSTALL}") from exc
    if done.returncode:
        said = done.stderr.strip().splitlines()
        raise BackendUnavailableError(
            f"the native backend's kernels were not compiled: {command[0]} says {said[0] if said else 'nothing'!r}; "
            f"another compiler: {INSTALL}, or CC="
        )


def _suffix() -> str:
    return {"win32": ".dll", "darwin": ".dylib"}.get(sys.platform, ".so")
