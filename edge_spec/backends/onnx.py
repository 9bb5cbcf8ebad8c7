"""ONNX Runtime backend: exports of `edge_spec.export`, with a cache that is written in place.

The cache tensors are bound as past and as present at once, so rolling back is forgetting a length. Every product of an
export (MatMulNBits) picks its kernel by the number of rows: padding each pass to a multiple of `spec.row_alignment`
rows keeps a row's logits the same bits whatever was decoded beside it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_spec.backends._cache_limits import check_decoded, check_exact
from edge_spec.backends._contiguous_cache import ContiguousCache
from edge_spec.backends._contiguous_model import ContiguousModel, capacity_for
from edge_spec.backends._mapped_file import drop_file_pages
from edge_spec.backends._onnx_session import import_library, session_options, translated
from edge_spec.backends._padded_model import scored_rows
from edge_spec.backends._quantized_graph import quantized_graph
from edge_spec.backends.alignment import MAX_ALIGNMENT, round_up
from edge_spec.backends.embedding_table import EmbeddingTable
from edge_spec.backends.kv_scales import KvScales
from edge_spec.backends.top_k import log_sum_exp
from edge_spec.backends.trimmed_head import TrimmedHead, told
from edge_spec.export import Export
from edge_spec.formats.gguf import GGUFFile
from edge_spec.types import Decoded, Logits, ModelSpec, Output

_NOTHING = (0, 0, 0)
"""For `_bound`: tokens, rows and padding of the pass that rows are bound for."""


class OnnxModel(ContiguousModel):
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
        super().__init__(spec, config)
        self._source = GGUFFile(export.source_file)
        self._embeddings: Any = EmbeddingTable(export, self._source)
        with self._translated(f"loading {name}"):
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
            self._cache: Any = ContiguousCache(config, n_ctx, capacity_for(n_ctx), kv_scales)
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
        return scored_rows(width, self._spec.max_rows)

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
        with self._translated(f"decoding {len(tokens)} tokens"):
            self._session.run_with_iobinding(self._binding)
        self._length += len(tokens)

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

    def _translated(self, doing: str) -> AbstractContextManager[None]:
        return translated(doing)

    def _bind_cache(self) -> None:
        """Bind the rotary tables and, each both as past and as present, the cache."""
        n_ctx = self._spec.n_ctx
        for name, table in self.config.rope_inputs(capacity_for(n_ctx), n_ctx).items():
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
