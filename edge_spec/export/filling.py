"""Fill an export's weights file: every source tensor, quantised, at its place."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from edge_spec.errors import ModelFormatError
from edge_spec.export.architecture import DecoderConfig, tensor_shapes
from edge_spec.export.calibration import MAX_TOKENS
from edge_spec.export.correct import RUN_COLUMNS, correction, quantize_corrected, runs_of
from edge_spec.export.forward import Forward
from edge_spec.export.layout import Job, Layout
from edge_spec.export.products import one_thread_a_product
from edge_spec.export.quantize import QuantizedRows, pack_zeros, quantize_rows, repack_exact
from edge_spec.formats.gguf import GGUFFile

Array = NDArray[np.float32]

CHUNK_WEIGHTS = 1 << 20
"""Weights that a worker turns at a time: its temporaries stay in the cache and the peak stays small."""

CORRECTED_CHUNK_WEIGHTS = 1 << 23
"""The same where errors are corrected, which goes by few columns at a time: many rows make that worth a call."""

ByteProgress = Callable[[int, int], object]
"""Called as `progress(done_bytes, total_bytes)` of the source tensors."""

_SAME_INPUT = {"attn_q": "attn_qkv", "attn_k": "attn_qkv", "attn_v": "attn_qkv", "ffn_gate": "ffn_up"}
"""Tensors that get the input of another projection, or are a part of it."""


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

    def round_to_nearest(self) -> None:
        """Turn every tensor by itself."""
        parts = ((job, rows) for job in self._layout.jobs for rows in _chunks(job, CHUNK_WEIGHTS))
        with ThreadPoolExecutor(self._threads) as pool:
            _finish(pool, [pool.submit(self._turn, job, rows, self._quantize) for job, rows in parts])
        self._report_all()

    def correct(self, config: DecoderConfig, vectors: Mapping[str, Array], texts: Sequence[Sequence[int]]) -> None:
        """Turn every tensor so that its products with what `texts` show it change least.

        Layer by layer: while the workers turn one, this thread reads the next one's weights and shows it the texts, so
        two layers are in memory. ModelFormatError if the model makes of the texts what is not finite.
        """
        forward = Forward(config, vectors, [len(text) for text in texts])
        ids = np.concatenate([np.asarray(text, np.int64) for text in texts])
        x = forward.embed(self._gguf.dequantize("token_embd.weight", ids))
        by_layer: dict[int, list[Job]] = {}
        for job in self._layout.jobs:
            name = job.tensor.name
            by_layer.setdefault(int(name.split(".")[1]) if name.startswith("blk.") else config.n_layer, []).append(job)
        head = by_layer.pop(config.n_layer)
        with one_thread_a_product(), ThreadPoolExecutor(self._threads) as pool:
            turning: list[Future[None]] = []
            for layer, jobs in by_layer.items():
                weights = {_part(job): self._dequantize(job, slice(0, job.n_rows)) for job in jobs}
                with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is refused below
                    passed = forward.layer(layer, x, _joined(weights))
                x = passed.output
                _finish(pool, turning)
                turning = self._correct(jobs, passed.inputs, weights, pool)
            with np.errstate(over="ignore", invalid="ignore"):
                normed = forward.norm("output_norm", x)
            _finish(pool, turning + self._correct(head, {_part(job): normed for job in head}, {}, pool))
        self._report_all()

    def _correct(
        self, jobs: Sequence[Job], inputs: Mapping[str, Array], weights: Mapping[str, Array], pool: ThreadPoolExecutor
    ) -> list[Future[None]]:
        """Begin to turn jobs whose `inputs` are known; `weights` of those that are in memory already."""
        wanted = {_input(job): job.matrix for job in jobs if job.corrected}
        if not all(np.isfinite(inputs[name]).all() for name, _ in wanted):
            like = jobs[0].tensor.name
            raise ModelFormatError(f"{self._gguf.path}: the inputs of {like} and its like are not finite")
        runs = {
            key: [pool.submit(correction, inputs[key[0]], run) for run in runs_of(matrix.row_length, matrix.block)]
            for key, matrix in wanted.items()
        }

        def quantize(job: Job, rows: slice) -> QuantizedRows:
            if not job.corrected:
                return self._quantize(job, rows)
            whole = weights.get(_part(job))
            return quantize_corrected(
                self._dequantize(job, rows) if whole is None else whole[rows],
                [run.result() for run in runs[_input(job)]],  # all of them begun, for the pool takes what came first
                bits=job.matrix.bits,
                block=job.matrix.block,
                zero_points=job.matrix.zeros is not None,
            )

        # The largest first, so that no thread is left with one of them at the end.
        largest_first = sorted(jobs, key=lambda job: -job.n_rows * job.tensor.shape[1])
        parts = ((job, rows) for job in largest_first for rows in _chunks(job, CORRECTED_CHUNK_WEIGHTS))
        return [pool.submit(self._turn, job, rows, quantize) for job, rows in parts]

    def _turn(self, job: Job, rows: slice, quantize: Callable[[Job, slice], QuantizedRows]) -> None:
        quantized = quantize(job, rows)
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

    def _report_all(self) -> None:
        if self._progress is not None:
            self._progress(self._total, self._total)


def corrected_bytes(config: DecoderConfig, threads: int) -> int:
    """About what `Filler.correct` holds at its peak: two layers in float32, query, key and value twice; what the text
    makes of them; factors; and the workers' own copies."""
    shapes = [shape for name, shape in tensor_shapes(config).items() if name.startswith("blk.0.") and len(shape) == 2]
    layer = sum(math.prod(shape) for shape in shapes) + config.qkv_rows * config.hidden
    passed = MAX_TOKENS * (6 * config.hidden + 2 * config.qkv_rows + 4 * config.n_ff)
    factors = 3 * config.hidden**2 + config.n_ff * min(config.n_ff, RUN_COLUMNS)
    worker = 3 * max(CORRECTED_CHUNK_WEIGHTS, config.hidden * RUN_COLUMNS)
    return 4 * (2 * (layer + passed) + factors + threads * worker)


def _finish(pool: ThreadPoolExecutor, futures: Sequence[Future[None]]) -> None:
    """Wait for all; the first that fails ends the others and is raised."""
    try:
        for future in futures:
            future.result()
    except BaseException:
        pool.shutdown(cancel_futures=True)
        raise


def _input(job: Job) -> tuple[str, int]:
    """Whose input a job's tensor gets, and the block that it is stored in."""
    return _SAME_INPUT.get(_part(job), _part(job)), job.matrix.block


def _part(job: Job) -> str:
    """`ffn_up` of `blk.3.ffn_up.weight`."""
    return job.tensor.name.removesuffix(".weight").rpartition(".")[2]


def _joined(weights: Mapping[str, Array]) -> dict[str, Array]:
    """A layer's matrices as the graph has them: query, key and value under each other."""
    if "attn_q" not in weights:
        return dict(weights)
    return {**weights, "attn_qkv": np.concatenate([weights[f"attn_{part}"] for part in "qkv"])}


def _chunks(job: Job, n_weights: int) -> Iterator[slice]:
    """A job's rows in equal parts of about so many weights."""
    n_parts = max(1, math.ceil(job.n_rows * job.tensor.shape[1] / n_weights))
    step = math.ceil(job.n_rows / n_parts)
    return (slice(start, min(start + step, job.n_rows)) for start in range(0, job.n_rows, step))
