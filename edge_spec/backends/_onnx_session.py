"""What every model on ONNX Runtime shares: how a session runs, and whose errors are whose."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from edge_spec.errors import BackendError, BackendMemoryError

MEMORY_REMEDY = "lower --ctx (n_ctx=), do without a draft model (--drafter lookup), or take a smaller model"


def import_library() -> Any:
    """ONNX Runtime, which would report every session to its makers over the network unless it is told not to before it
    is imported (1.29 and later, Linux too). A value that the user set is left alone."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    import onnxruntime

    return onnxruntime


def session_options(ort: Any, threads: int, *, weights_folder: Path | None = None) -> Any:
    """Options of a session that runs one operator at a time on so many threads.

    `weights_folder`: where a graph that is given as bytes has its weights.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # what fails is raised; no need to print it too
    # Workers that spin on after a run take the cores that the other model's run needs.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if weights_folder is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(weights_folder))
    return options


@contextmanager
def translated(doing: str) -> Iterator[None]:
    """Turn ONNX Runtime's exceptions, which share no base of their own, and a want of memory into BackendError."""
    try:
        yield
    except Exception as exc:
        from onnxruntime.capi import onnxruntime_pybind11_state as state

        kinds: list[type[Exception]] = [
            kind for kind in vars(state).values() if isinstance(kind, type) and issubclass(kind, Exception)
        ]
        if isinstance(exc, MemoryError) or "bad_alloc" in str(exc):
            raise BackendMemoryError(f"not enough memory for {doing}; {MEMORY_REMEDY}") from exc
        if not isinstance(exc, (RuntimeError, ValueError, *kinds)):
            raise
        raise BackendError(f"ONNX Runtime failed while {doing}: {exc}") from exc
