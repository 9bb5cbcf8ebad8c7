"""The llama.cpp library itself: importing it, its log, and loading a model file, with its errors translated."""

from __future__ import annotations

import ctypes
import os
import threading
from pathlib import Path
from typing import Any

from edge_spec.errors import (
    BackendError,
    BackendUnavailableError,
    EdgeSpecError,
    ModelFormatError,
    UnsupportedArchitectureError,
)

INSTALL_COMMAND = "pip install 'edge-spec[llama]'"
_ERROR_LEVEL = 4  # GGML_LOG_LEVEL_ERROR in ggml.h
_ERRORS_KEPT = 8

# llama.cpp reports the reason of a failure only to its log. The callback must outlive the library's use of it.
_errors: list[str] = []
_log_callback: Any = None
_lock = threading.Lock()


def import_library() -> Any:
    """The low-level `llama_cpp` module, initialised once, its log silenced and its errors collected.

    Raises BackendUnavailableError if it is not installed, or is but cannot be loaded.
    """
    try:
        import llama_cpp
    except ModuleNotFoundError as exc:
        if exc.name != "llama_cpp":
            raise BackendUnavailableError(
                f"llama-cpp-python lacks {exc.name}; install it again: {INSTALL_COMMAND}"
            ) from exc
        raise BackendUnavailableError(
            f"the llama backend needs llama-cpp-python, which is not installed: {INSTALL_COMMAND}"
        ) from exc
    except (ImportError, OSError, RuntimeError, AttributeError) as exc:
        # What its binding raises when the shared library is missing, built for another CPU, or lacks a symbol.
        raise BackendUnavailableError(
            f"llama-cpp-python is installed but does not load ({exc}); build it again: "
            f"pip install --force-reinstall --no-cache-dir 'edge-spec[llama]'"
        ) from exc
    global _log_callback  # noqa: PLW0603  (the library's log is one a process)
    with _lock:
        if _log_callback is None:
            _log_callback = llama_cpp.llama_log_callback(_collect_error)
            llama_cpp.llama_log_set(_log_callback, ctypes.c_void_p(0))
            llama_cpp.llama_backend_init()
    return llama_cpp


def _collect_error(level: int, text: bytes, _user_data: Any) -> None:
    if level == _ERROR_LEVEL and len(_errors) < _ERRORS_KEPT:
        _errors.append(text.decode(errors="replace").strip())


def forget_errors() -> None:
    """Start collecting anew, before a call whose failure is to be explained."""
    _errors.clear()


def last_reason() -> str:
    """What llama.cpp logged first about the failure (its later lines repeat it), without its functions' names."""
    if not _errors:
        return "it gave no reason"
    return _errors[0].split(": ", 1)[-1].removeprefix("error loading model: ")


def load_model(library: Any, path: Path) -> Any:
    """The handle of the mapped model file; raises what its reason deserves, in this package's terms."""
    params = library.llama_model_default_params()
    params.n_gpu_layers = 0
    forget_errors()
    model = library.llama_model_load_from_file(os.fsencode(path), params)
    if not model:
        raise _translated(f"llama.cpp cannot load {path.name}: {last_reason()}")
    return model


def _translated(message: str) -> EdgeSpecError:
    if "unknown model architecture" in message or "pre-tokenizer" in message:
        return UnsupportedArchitectureError(message)
    if "alloc" in message or "mmap" in message or "open" in message:
        return BackendError(message)
    return ModelFormatError(message)
