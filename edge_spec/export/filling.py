"""Fill an export's weights file: every source tensor, quantised, at its place."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from edge_spec.errors import ModelFormatError
from edge_spec.export.layout import Job, Layout
from edge_spec.export.quantize import QuantizedRows, pack_zeros, quantize_rows, repack_exact
from edge_spec.formats.gguf import GGUFFile

Array = NDArray[np.float32]

CHUNK_WEIGHTS = 1 << 20
"""Weights that a worker turns at a time: its temporaries stay in the cache and the peak stays small."""

ByteProgress = Callable[[int, int], object]
"""Called as `progress(done_bytes, total_bytes)` of the source tensors."""


class Filler:
    """Writes the jobs of a layout to a file, some rows at a time on each thread (NumPy lets go of the interpreter's
    lock)."""

    def __init__(
        self, gguf: GGUFFile, layout: Layout, file: BinaryIO, threads: int, progress: ByteProgress | None
    ) -> None:
        file.truncate(layout.n_bytes)
        self._gguf, self._layout, self._file, self._threads = gguf, layout, file, threads
        self._progress = progress
        self._done = 0
        self._total = sum(job.tensor.row_bytes * job.n_rows for job in layout.jobs)
        self._lock = Lock()

    def fill(self) -> None:
        """Turn every tensor. The first failure stops the others and is raised."""
        parts = ((job, rows) for job in self._layout.jobs for rows in _chunks(job))
        with ThreadPoolExecutor(self._threads) as pool:
            futures = [pool.submit(self._turn, job, rows) for job, rows in parts]
            try:
                for future in futures:
                    future.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        if self._progress is not None:
            self._progress(self._total, self._total)

    def _turn(self, job: Job, rows: slice) -> None:
        quantized = self._quantize(job, rows)
        matrix, first = job.matrix, job.first_row + rows.start
        with self._lock:
            stored = [(matrix.packed, quantized.packed), (matrix.scales, quantized.scales)]
            if matrix.zeros is not None and quantized.zeros is not None:
                stored.append((matrix.zeros, pack_zeros(quantized.zeros, matrix.bits)))
            for span, values in stored:
                self._file.seek(span.offset + first * (span.length // matrix.n_rows))
                self._file.write(np.ascontiguousarray(values).data)
            self._done += job.tensor.row_bytes * (rows.stop - rows.start)
            if self._progress is not None:
                self._progress(min(self._done, self._total), self._total)

    def _quantize(self, job: Job, rows: slice) -> QuantizedRows:
        if job.exact:
            wanted = rows if job.picked is None else job.picked[rows]
            return repack_exact(self._gguf.raw(job.tensor.name)[wanted], job.tensor.type)
        matrix = job.matrix
        zero_points = matrix.zeros is not None
        return quantize_rows(self._dequantize(job, rows), bits=matrix.bits, block=matrix.block, zero_points=zero_points)

    def _dequantize(self, job: Job, rows: slice) -> Array:
        name, wanted = job.tensor.name, rows if job.picked is None else job.picked[rows]
        weights = self._gguf.dequantize(name, wanted)
        if not np.isfinite(weights).all():
            raise ModelFormatError(f"{self._gguf.path}: {self._gguf.title(name)} holds values that are not finite")
        return weights


def _chunks(job: Job) -> Iterator[slice]:
    """A job's rows in equal parts of about CHUNK_WEIGHTS weights."""
    n_parts = max(1, math.ceil(job.n_rows * job.tensor.shape[1] / CHUNK_WEIGHTS))
    step = math.ceil(job.n_rows / n_parts)
    return (slice(start, min(start + step, job.n_rows)) for start in range(0, job.n_rows, step))
