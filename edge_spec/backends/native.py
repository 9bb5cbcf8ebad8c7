"""Native backend: exports of `edge_spec.export`, on kernels of our own.

The kernels (`edge_spec.kernels`) are compiled for the processor at hand and multiply weights where they are mapped, so
that no second copy of them is held. A row's logits are the same bits in every pass, so that nothing is padded.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_spec.backends._cache_limits import check_decoded, check_exact
from edge_spec.backends._contiguous_cache import ContiguousCache
from edge_spec.backends._contiguous_model import ContiguousModel, capacity_for
from edge_spec.backends._onnx_session import MEMORY_REMEDY
from edge_spec.backends._padded_model import scored_rows
from edge_spec.backends.alignment import MAX_ALIGNMENT, round_up
from edge_spec.backends.embedding_table import EmbeddingTable
from edge_spec.backends.top_k import log_sum_exp
from edge_spec.backends.trimmed_head import MAX_REACHED, TrimmedHead, told
from edge_spec.errors import BackendError, BackendMemoryError, UnsupportedArchitectureError, UsageError
from edge_spec.export import Export
from edge_spec.export.graph import HEAD
from edge_spec.export.stored import map_weights, read_weights
from edge_spec.formats.gguf import GGUFFile
from edge_spec.kernels.build import load_library
from edge_spec.kernels.library import CHUNK, MOST_DIM
from edge_spec.kernels.program import Program
from edge_spec.types import TOP_K, Decoded, Logits, ModelSpec, Output

_KINDS: dict[str, type[np.floating[Any]]] = {"f16": np.float16, "f32": np.float32}
"""What keys and values may be stored as."""
_NONE = np.empty(0, np.int64)
"""The wanted rows of a pass whose logits nobody asks for: the head is left out then."""


class NativeModel(ContiguousModel):
    """An export on kernels of our own; implements `backends.base.CausalLM`.

    `threads` go through a pass together; `kv` is how keys and values are stored, "f16" or "f32". The kernels are
    compiled into `kernels_dir` at the first use. Raises BackendUnavailableError where there is no compiler.
    """

    def __init__(
        self,
        export: Export,
        *,
        name: str,
        n_ctx: int,
        threads: int,
        kernels_dir: Path,
        kv: str = "f16",
        max_rows: int = 16,
    ) -> None:
        config = export.config
        check_exact(config, name, n_ctx)
        if kv not in _KINDS:
            raise UsageError(f"kv={kv!r}: choose one of {', '.join(_KINDS)}")
        if config.head_dim > MOST_DIM:
            raise UnsupportedArchitectureError(
                f"{name} has heads of {config.head_dim} numbers; at most {MOST_DIM}: run it on the onnx backend"
            )
        kind = _KINDS[kv]
        max_rows = min(round_up(max_rows, MAX_ALIGNMENT), CHUNK - MAX_ALIGNMENT)  # one chunk has them all, padded too
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
            kv_bytes_per_token=2 * config.n_layer * config.n_kv_head * config.head_dim * kind().itemsize,
            max_rows=max_rows,
            row_alignment=None,
            kv_type=kv,
            can_evict=True,
            can_resize=True,
            can_park=True,
        )
        super().__init__(spec, config)
        library = load_library(kernels_dir)
        weights = read_weights(export)
        self._source = GGUFFile(export.source_file)
        self._embeddings: Any = EmbeddingTable(export, self._source)
        self._weights: Any = map_weights(export)
        self._head = TrimmedHead.of(export, max_rows, self._source)
        head_rows = sum(part.n_rows for part in weights.matrices[HEAD])
        scored = scored_rows(head_rows, max_rows)
        with self._translated(f"loading {name}"):
            self._cache: Any = ContiguousCache(config, n_ctx, capacity_for(n_ctx), kind=kind)
            self._program: Any = Program(
                library,
                config,
                weights,
                np.frombuffer(self._weights, np.uint8),
                threads=threads,
                scored=scored,
                room=0 if self._head is None else MAX_REACHED,
                top_k=0 if self._head is None else min(TOP_K, head_rows),
            )
            self._bind_cache()
            self._bind_reached()
        self.scored_rows = scored
        """See `Scoring.scored_rows`."""

    def decode(self, tokens: Sequence[int], *, rows: int = 1, want: Output = Output.LOGITS) -> Decoded:
        """See `CausalLM.decode`."""
        self._require_open()
        n = len(tokens)
        check_decoded(self._spec, n, rows, self._length)
        self._read(tokens, rows)
        return told(self._head, self._written(), rows, want)

    def score(self, tokens: Sequence[int], following: Sequence[int]) -> Logits:
        """See `Scoring.score`."""
        self._require_open()
        n = len(tokens)
        check_decoded(self._spec, n, 1, self._length)
        if n > self.scored_rows:
            raise UsageError(f"{n} tokens to score; at most {self.scored_rows} in a pass")
        self._read(tokens, n)
        asked = np.asarray(following, np.int64)
        if self._head is not None:
            return self._head.log_probs(self._written(), asked)
        logits = self._program.logits[:n]
        return np.asarray(logits[np.arange(n), asked] - log_sum_exp(logits), np.float32)

    def _read(self, tokens: Sequence[int], rows: int) -> None:
        """Append `tokens`, in passes of at most CHUNK of them, the last of which scores the last `rows`."""
        ids = self._padded(tokens)
        padding = len(ids) - len(tokens)
        ends = range(len(ids) % CHUNK or CHUNK, len(ids) + 1, CHUNK)
        start = 0
        for end in ends:
            part = ids[start:end]
            embeddings = self._program.embeddings[: len(part)]
            embeddings[...] = self._embeddings.rows(part)
            if self.config.embedding_scale != 1:
                embeddings *= np.float32(self.config.embedding_scale)
            is_last = end == len(ids)
            wanted = self._wanted(len(part) - padding, rows) if is_last and rows else _NONE
            with self._translated(f"decoding {len(tokens)} tokens"):
                self._program.run(len(part), self._length, wanted)
            self._length += len(part) - (padding if is_last else 0)
            start = end

    def _written(self) -> dict[str, NDArray[Any]]:
        program = self._program
        if self._head is None:
            return {"logits": program.logits}
        return {
            "logits": program.logits,
            "hidden": program.normed,
            "top_logits": program.largest,
            "top_places": program.places,
            "log_sum": program.log_sums,
        }

    def reach(self, tokens: Iterable[int], *, anew: bool = False) -> None:
        """Give logits to these tokens too, where the head is trimmed; the others stay at minus infinity, and `anew`
        those that were reached before are among them again."""
        if self._head is not None and self._head.reach(tokens, anew=anew):
            self._bind_reached()

    def close(self) -> None:
        """Give the cache and the buffers back, and end the threads."""
        self._is_open = False
        self._parked.free()
        self._source.close()
        if self._program is not None:
            self._program.close()
        self._program = self._weights = self._head = self._embeddings = self._cache = None

    @contextmanager
    def _translated(self, doing: str) -> Iterator[None]:
        try:
            yield
        except MemoryError as exc:
            raise BackendMemoryError(f"not enough memory for {doing}; {MEMORY_REMEDY}") from exc
        except RuntimeError as exc:  # no more threads are to be had, or the interpreter is going
            raise BackendError(f"the native backend failed while {doing}: {exc}") from exc

    def _bind_cache(self) -> None:
        n_ctx = self._spec.n_ctx
        self._tables = self.config.rope_inputs(capacity_for(n_ctx), n_ctx)
        self._program.bind_cache(self._cache.keys, self._cache.values, self._tables)

    def _bind_reached(self) -> None:
        """Show the program what a trimmed head adds; it stays in the head's memory."""
        if self._head is not None:
            inputs = self._head.inputs
            self._program.bind_reached(inputs["reached"], inputs["reached_bias"])
