"""Read the weights of an export back from its file, through the places that its graph is told."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edge_spec.export import Export
from edge_spec.export.finished import WEIGHTS
from edge_spec.export.layout import plan_layout
from edge_spec.export.quantize import QuantizedRows, dequantize_rows
from edge_spec.formats.gguf import GGUFFile


def exported_values(export: Export, source: Path) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """The name and the values, float32 in its own shape, of every tensor of `source` that the export quantised."""
    stored = np.fromfile(export.path / WEIGHTS, np.uint8)
    with GGUFFile(source) as gguf:
        jobs = plan_layout(gguf, export.config, export.recipe).jobs
    for job in jobs:
        matrix = job.matrix
        packed = stored[matrix.packed.offset :][: matrix.packed.length]
        scales = stored[matrix.scales.offset :][: matrix.scales.length].view(np.float32)
        blocks = matrix.row_length // matrix.block
        rows = QuantizedRows(packed.reshape(matrix.n_rows, blocks, -1), scales.reshape(matrix.n_rows, blocks))
        values = dequantize_rows(rows, bits=matrix.bits)
        yield job.tensor.name, values[job.first_row :][: job.tensor.shape[0]]
