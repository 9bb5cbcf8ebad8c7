"""Runs optimum's ONNX exporter on a checkpoint, in a process and an environment of its own."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

from edge_spec.checkpoint import optimum_child
from edge_spec.checkpoint.folder import Checkpoint
from edge_spec.errors import BackendError, StorageError, UnsupportedArchitectureError

_OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "ORT_DISABLE_TELEMETRY": "1",
}


def run_optimum(checkpoint: Checkpoint, python: Path, folder: Path) -> Path:
    """Write the checkpoint's float32 graph below `folder`, with a cache as inputs and outputs; returns its file.

    Nothing is fetched, and no code out of the checkpoint runs. Raises UnsupportedArchitectureError where optimum does
    not know the architecture, StorageError where the disk is full, BackendError for whatever else stops it.
    """
    command = [str(python), "-P", str(Path(optimum_child.__file__)), str(checkpoint.path.resolve()), str(folder)]
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env=os.environ | _OFFLINE,
    ) as child:
        try:
            assert child.stderr is not None
            lines = [line.strip() for line in child.stderr if line.strip()][-40:]
            code = child.wait()
        finally:
            child.kill()
    graph = folder / "model.onnx"
    if code == 0 and graph.is_file():
        return graph
    reason = lines[-1] if lines else f"exit code {code}"
    if code == optimum_child.UNKNOWN:
        raise UnsupportedArchitectureError(
            f"{checkpoint.path}: optimum does not export the architecture {checkpoint.model_type!r} ({reason})"
        )
    if any("No space left" in line or "File too large" in line for line in lines):
        raise StorageError(f"optimum could not write its graph to {folder}: {reason}; make room on that disk")
    if code in (-signal.SIGKILL, 128 + signal.SIGKILL) or any("memory" in line.lower() for line in lines[-3:]):
        raise BackendError(
            f"optimum ran out of memory exporting {checkpoint.name}: it holds the whole model in float32, "
            f"{4 * checkpoint.weight_bytes // 2 >> 20} MiB and more"
        )
    raise BackendError(f"optimum failed to export {checkpoint.name}: {reason}")
