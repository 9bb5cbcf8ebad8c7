"""ONNX Runtime backend: exports of `edge_spec.export`, with a cache that is written in place.

The cache tensors are bound as past and as present at once, so rolling back is forgetting a length. Every product of an
export (MatMulNBits) picks its kernel by the number of rows: padding each pass to a multiple of `spec.row_alignment`
rows keeps a row's logits the same bits whatever was decoded beside it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_spec.backends._cache_limits import (
    check_decoded,
    check_evicted,
    check_exact,
    check_parks,
    check_resized,
)
from edge_spec.backends._contiguous_cache import ContiguousCache, ParkedArrays
from edge_spec.backends._mapped_file import drop_file_pages
from edge_spec.backends._onnx_session import import_library, session_options, translated
from edge_spec.backends._padded_model import PaddedModel
from edge_spec.backends._parked_here import ParkedHere
from edge_spec.backends._quantized_graph import quantized_graph
from edge_spec.backends.alignment import MAX_ALIGNMENT, round_up
from edge_spec.backends.base import Parked
from edge_spec.backends.embedding_table import EmbeddingTable
from edge_spec.backends.kv_scales import KvScales
from edge_spec.backends.top_k import log_sum_exp
from edge_spec.backends.trimmed_head import TrimmedHead, told
from edge_spec.export import Export
from edge_spec.formats.gguf import GGUFFile
from edge_spec.types import Decoded, Logits, ModelSpec, Output

SCORED_BYTES = 8 << 20
"""Logits that a scored pass may hold."""
_NOTHING = (0, 0, 0)
"""For `_bound`: tokens, rows and padding of the pass that rows are bound for."""


class OnnxModel(PaddedModel):
    """An export on ONNX Runtime; implements `backends.base.CausalLM`.

    `threads` run one operator at a time. With `kv_scales` (`edge_spec.backends.kv_scales` measures them) keys and
    values are stored in 8 bits, else as float32.
    """

    def __init__(
        self,
        export: Export,
        *,
        name: str,
        n_ctx: int,
        threads: int,
        max_rows: int = 16,
        kv_scales: KvScales | None = None,
    ) -> None:
        ort = import_library()

        config = export.config
        check_exact(config, name, n_ctx)
        kv_size = 4 if kv_scales is None else 1
        max_rows = round_up(max_rows, MAX_ALIGNMENT)
        spec = ModelSpec(
            name=name,
            architecture=config.architecture,
            n_vocab=config.n_vocab,
            n_ctx=n_ctx,
            n_ctx_train=config.n_ctx_train,
            n_layer=config.n_layer,
            n_kv_heads=config.n_kv_head,
            head_dim=config.head_dim,
            weight_bytes=export.weight_bytes,
            kv_bytes_per_token=2 * config.n_layer * config.n_kv_head * config.head_dim * kv_size,
            max_rows=max_rows,
            row_alignment=None,
            kv_type="f32" if kv_scales is None else "q8",
            can_evict=True,
            can_resize=True,
            can_park=True,
        )
        super().__init__(spec)
        self.config = config
        self._parked: ParkedHere[ParkedArrays] = ParkedHere()
        self._source = GGUFFile(export.source_file)
        self._embeddings: Any = EmbeddingTable(export, self._source)
        with translated(f"loading {name}"):
            self._session: Any = ort.InferenceSession(
                str(export.model_file) if kv_scales is None else quantized_graph(export),
                session_options(ort, threads, weights_folder=export.path),
                providers=["CPUExecutionProvider"],
                enable_fallback=0,  # it would print to standard output and try the same again
            )
            self._binding: Any = self._session.io_binding()
            self._head = TrimmedHead.of(export, max_rows, self._source)
            self._logits = np.empty((max_rows if self._head is None else 0, config.n_vocab), np.float32)
            self._written: dict[str, NDArray[Any]] = {}
            self._bound = _NOTHING
            self._held: dict[str, Any] = {}  # arrays that the binding points into, which it does not keep alive
            self._last, self._total = np.zeros(1, np.int32), np.zeros((), np.int32)
            self._bind("seqlens_k", self._last)
            self._bind("total_sequence_length", self._total)
            self._cache: Any = ContiguousCache(config, n_ctx, _capacity(n_ctx), kv_scales)
            if kv_scales is not None:
                self._bind_scales(kv_scales)
            self._bind_cache()
            self._bind_reached()
        drop_file_pages(export.weights_file.resolve())  # the kernels have copies in an order of their own

    def decode(self, tokens: Sequence[int], *, rows: int = 1, want: Output = Output.LOGITS) -> Decoded:
        """See `CausalLM.decode`."""
        self._require_open()
        n = len(tokens)
        check_decoded(self._spec, n, rows, self._length)
        passed = (n, rows, self._padding)
        if self._bound != passed:
            wanted = self._wanted(n, rows)
            self._bind_rows(wanted, self._logits[: len(wanted)])
            self._bound = passed
        self._run(tokens)
        return told(self._head, self._written, rows, want)

    @property
    def scored_rows(self) -> int:
        """See `Scoring.scored_rows`."""
        width = int(self._logits.shape[1]) if self._head is None else self._head.width
        return max(self._spec.max_rows, min(64, SCORED_BYTES // (4 * width)))

    def score(self, tokens: Sequence[int], following: Sequence[int]) -> Logits:
        """See `Scoring.score`."""
        self._require_open()
        n = len(tokens)
        check_decoded(self._spec, n, 1, self._length)
        wanted = self._wanted(n, n)
        logits = np.empty((len(wanted) if self._head is None else 0, self._logits.shape[1]), np.float32)
        self._bind_rows(wanted, logits)
        self._run(tokens)
        asked, written = np.asarray(following, np.int64), self._written
        self._written = {}  # the next pass writes elsewhere
        if self._head is not None:
            return self._head.log_probs(written, asked)
        return np.asarray(logits[np.arange(n), asked] - log_sum_exp(logits[:n]), np.float32)

    def _run(self, tokens: Sequence[int]) -> None:
        """One pass over `tokens`, of which rows are asked and written as they were bound."""
        ids = self._padded(tokens)
        total = self._length + len(ids)
        self._feed("embeddings", self._embeddings.rows(ids)[None])
        self._last[0], self._total[...] = total - 1, total
        with translated(f"decoding {len(tokens)} tokens"):
            self._session.run_with_iobinding(self._binding)
        self._length += len(tokens)

    def evict(self, start: int, end: int) -> None:
        """See `CausalLM.evict`; costs a copy of what moves."""
        self._require_open()
        check_evicted(self._spec, start, end, self._length)
        if start < end:
            self._cache.evict(start, end, self._length)
            self._length -= end - start

    def resize(self, n_ctx: int) -> None:
        """See `CausalLM.resize`; a smaller cache is never held beside the larger one."""
        self._require_open()
        check_resized(self._spec, self._length, n_ctx)
        check_exact(self.config, self._spec.name, n_ctx)
        with translated(f"a cache of {n_ctx} tokens"):
            self._cache.resize(n_ctx, _capacity(n_ctx), self._length)
            self._spec = replace(self._spec, n_ctx=n_ctx)
            self._bind_cache()

    @property
    def park_bytes(self) -> int:
        """See `CausalLM.park_bytes`."""
        return self._length * self._spec.kv_bytes_per_token

    def park(self) -> Parked:
        """See `CausalLM.park`; costs a copy."""
        self._require_open()
        check_parks(self._spec)
        with translated(f"setting {self._length} tokens aside"):
            return self._parked.add(self._cache.park(self._length))

    def resume(self, parked: Parked) -> None:
        """See `CausalLM.resume`; costs a copy, whose source goes layer by layer."""
        self._require_open()
        taken = self._parked.check(self._spec, parked)
        with translated(f"taking {taken.length} tokens up again"):
            self._cache.resume(taken)
        self._length = taken.length

    def swap(self, parked: Parked) -> Parked:
        """See `CausalLM.swap`; layer by layer."""
        self._require_open()
        taken = self._parked.check(self._spec, parked)
        with translated(f"setting {self._length} tokens aside"):
            left = self._cache.swap(taken, self._length)
        self._length = taken.length
        return self._parked.add(left)

    def cached_layers(self) -> Iterator[tuple[NDArray[Any], NDArray[Any]]]:
        """Keys and values of each layer as they are stored, [n_kv_head, length, head_dim]; views."""
        for keys, values in zip(self._cache.keys, self._cache.values, strict=True):
            yield keys[0, :, : self._length], values[0, :, : self._length]

    def reach(self, tokens: Iterable[int], *, anew: bool = False) -> None:
        """Give logits to these tokens too, where the head is trimmed; the others stay at minus infinity, and `anew`
        those that were reached before are among them again."""
        if self._head is not None and self._head.reach(tokens, anew=anew):
            self._bind_reached()
            self._bound = _NOTHING  # rows are longer now

    def close(self) -> None:
        """Give the session, the cache and the buffers back."""
        self._is_open = False
        self._parked.free()
        self._source.close()
        # The binding points into what is held, and goes first.
        self._binding = self._session = self._head = self._embeddings = None
        self._cache = None
        self._held.clear()
        self._written.clear()
        self._logits = np.empty((0, 0), np.float32)

    def _bind_cache(self) -> None:
        """Bind the rotary tables and, each both as past and as present, the cache."""
        n_ctx = self._spec.n_ctx
        for name, table in self.config.rope_inputs(_capacity(n_ctx), n_ctx).items():
            self._bind(name, table)
        for name, cache in self._cache.arrays():
            self._bind(f"past_{name}", cache)
            self._bind_output(name, cache.shape, cache)

    def _bind_scales(self, scales: KvScales) -> None:
        for layer in range(self._spec.n_layer):
            for kind, rows in zip(("key", "value"), scales, strict=True):
                self._bind(f"{kind}_scale.{layer}", rows[layer])

    def _bind_rows(self, wanted: NDArray[np.int64], logits: Logits) -> None:
        """Ask for rows, and bind what the head writes of them: `logits` if it is whole."""
        self._bound = _NOTHING
        self._bind("rows", wanted)
        self._written = {"logits": logits} if self._head is None else self._head.buffers(len(wanted))
        for name, array in self._written.items():
            self._bind_output(name, (1, *array.shape), array)

    def _bind_reached(self) -> None:
        """Bind what a trimmed head adds to the inputs."""
        if self._head is not None:
            for name, array in self._head.inputs.items():
                self._bind(name, array)

    def _feed(self, name: str, array: NDArray[Any]) -> None:
        """Give a pass its input: into the array that is bound already where that has the same shape."""
        held = self._held.get(name)
        if held is not None and held.shape == array.shape:
            held[...] = array
        else:
            self._bind(name, array)

    def _bind(self, name: str, array: NDArray[Any]) -> None:
        self._held[name] = array
        self._binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)

    def _bind_output(self, name: str, shape: tuple[int, ...], array: NDArray[Any]) -> None:
        self._binding.bind_output(name, "cpu", 0, array.dtype.type, shape, array.ctypes.data)


def _capacity(n_ctx: int) -> int:
    """Tokens that a cache needs room for: the padding of the last one too."""
    return n_ctx + MAX_ALIGNMENT - 1
