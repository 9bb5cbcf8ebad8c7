"""OpenVINO backend: exports of `edge_spec.export`, with paged attention over a cache in blocks.

The graph is built from the export's own weights file, which stays mapped. The cache's blocks are arrays of this model;
a pass names the blocks it uses and how many tokens they hold, so rolling back is forgetting a length. Kernels depend on
the number of rows here too: see `edge_spec.backends.alignment`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
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
from edge_spec.backends._onnx_session import MEMORY_REMEDY
from edge_spec.backends._openvino_graph import build_model, rotary_factors
from edge_spec.backends._openvino_limits import check_expressible
from edge_spec.backends._padded_model import PaddedModel
from edge_spec.backends._paged_cache import KV_TYPES, PagedCache, token_bytes
from edge_spec.backends.alignment import MAX_ALIGNMENT, round_up
from edge_spec.backends.base import Parked
from edge_spec.backends.embedding_table import EmbeddingTable
from edge_spec.backends.trimmed_head import TrimmedHead, told
from edge_spec.errors import (
    BackendError,
    BackendMemoryError,
    BackendUnavailableError,
    UsageError,
)
from edge_spec.export import Export
from edge_spec.export.stored import give_back, map_weights, read_weights
from edge_spec.formats.gguf import GGUFFile
from edge_spec.types import Decoded, ModelSpec, Output

_GROUP = "DYNAMIC_QUANTIZATION_GROUP_SIZE"


class OpenVinoModel(PaddedModel):
    """An export on OpenVINO; implements `backends.base.CausalLM`.

    `threads` run one operator at a time. `kv`, one of KV_TYPES, is what keys and values are stored as. Address space is
    set aside for sequences that are parked, `park_bytes` beside the cache; with 0 none can be. Raises
    UnsupportedArchitectureError for an export that only the onnx backend runs, BackendUnavailableError where OpenVINO
    is not installed.
    """

    def __init__(
        self,
        export: Export,
        *,
        name: str,
        n_ctx: int,
        threads: int,
        max_rows: int = 16,
        kv: str = "f16",
        park_bytes: int = 0,
    ) -> None:
        if kv not in KV_TYPES:
            raise UsageError(f"kv={kv!r}: the openvino backend stores keys and values as {', '.join(KV_TYPES)}")
        config = export.config
        check_expressible(config, name)
        check_exact(config, name, n_ctx)
        ov = import_library()
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
            kv_bytes_per_token=token_bytes(config, kv),
            max_rows=max_rows,
            row_alignment=None,
            kv_type=kv,
            can_evict=kv != "u8",
            can_resize=kv != "u8" or config.rope_long_factors is None,
            can_park=park_bytes > 0,
        )
        super().__init__(spec)
        self._config = config
        self._source = GGUFFile(export.source_file)
        self._embeddings: Any = EmbeddingTable(export, self._source)
        weights = read_weights(export)
        blocks = sorted({part.block for parts in weights.matrices.values() for part in parts})
        self._weights: Any = map_weights(export)
        settings = {
            "INFERENCE_PRECISION_HINT": "f32",
            "KV_CACHE_PRECISION": kv,
            # Activations are quantised in groups; one larger than a matrix's block takes a far slower kernel.
            _GROUP: str(blocks[0]),
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            "ENABLE_CPU_PINNING": False,
        }
        with _translated(ov, f"loading {name}"):
            cache = PagedCache(config, n_ctx, _capacity(n_ctx), kv, park_bytes)
            self._cache: Any = cache
            self._parked = cache.parked
            self._head = TrimmedHead.of(export, max_rows, self._source)
            model = build_model(config, weights, np.frombuffer(self._weights, np.uint8))
            self._compiled: Any = _core().compile_model(model, "CPU", settings)
            self.notes = _group_notes(name, blocks, int(self._compiled.get_property(_GROUP)))
            """What the user should know of the load."""
            self._request: Any = self._compiled.create_infer_request()
            self._ov = ov
            self._held: dict[str, Any] = {}  # arrays that the request's tensors point into
            self._outputs = [output.get_any_name() for output in self._compiled.outputs]
            self._bind_cache()
            self._set_reached()
        # The first pass copies the weights into an order of the plugin's own, and is done with the file.
        self.decode([0], rows=0)
        self.rollback(0)
        give_back(self._weights)

    def decode(self, tokens: Sequence[int], *, rows: int = 1, want: Output = Output.LOGITS) -> Decoded:
        """See `CausalLM.decode`."""
        self._require_open()
        n = len(tokens)
        check_decoded(self._spec, n, rows, self._length)
        ids, start = self._padded(tokens), self._length
        total = start + len(ids)
        with _translated(self._ov, f"a cache of {total} tokens"):
            blocks = self._cache.use(start, total)
        self._set("embeddings", self._embeddings.rows(ids))
        self._set("rows", self._wanted(n, rows))
        for name, table in self._rotary.items():
            self._set(name, table[start:total])
        self._set("past_lens", np.array([start], np.int32))
        self._set("subsequence_begins", np.array([0, len(ids)], np.int32))
        self._set("block_indices", blocks)
        self._set("block_indices_begins", np.array([0, len(blocks)], np.int32))
        self._set("max_context_len", np.array(total, np.int32))
        with _translated(self._ov, f"decoding {n} tokens"):
            self._request.infer(share_outputs=True)
            written = {name: self._request.get_tensor(name).data for name in self._outputs}
        self._length += n
        return told(self._head, written, rows, want)

    def rollback(self, length: int) -> None:
        """See `CausalLM.rollback`; any length, and the memory of what is forgotten goes back to the system."""
        super().rollback(length)
        self._cache.forget(length)

    def evict(self, start: int, end: int) -> None:
        """See `CausalLM.evict`; costs a copy of what moves."""
        self._require_open()
        check_evicted(self._spec, start, end, self._length)
        if start < end:
            with _translated(self._ov, f"dropping {end - start} tokens"):
                self._cache.evict(start, end, self._length)
            self.rollback(self._length - (end - start))

    def resize(self, n_ctx: int) -> None:
        """See `CausalLM.resize`. Memory follows what is cached, whatever the window."""
        self._require_open()
        check_resized(self._spec, self._length, n_ctx)
        check_exact(self._config, self._spec.name, n_ctx)
        with _translated(self._ov, f"a cache of {n_ctx} tokens"):
            self._cache.resize(n_ctx, _capacity(n_ctx))
            self._spec = replace(self._spec, n_ctx=n_ctx)
            self._bind_cache()

    @property
    def park_bytes(self) -> int:
        """See `CausalLM.park_bytes`: nothing is copied."""
        return 0

    def park(self) -> Parked:
        """See `CausalLM.park`: the blocks stay where they are."""
        self._require_open()
        check_parks(self._spec)
        parked: Parked = self._cache.park(self._length)
        return parked

    def resume(self, parked: Parked) -> None:
        """See `CausalLM.resume`: other blocks are cached from now on."""
        self._require_open()
        taken = self._parked.check(self._spec, parked)
        self._cache.resume(taken)
        self._length = taken.length

    def swap(self, parked: Parked) -> Parked:
        """See `CausalLM.swap`."""
        self._require_open()
        return self._parked.swap(self, parked)

    def reach(self, tokens: Iterable[int], *, anew: bool = False) -> None:
        """Give logits to these tokens too, where the head is trimmed; the others stay at minus infinity, and `anew`
        those that were reached before are among them again."""
        if self._head is not None and self._head.reach(tokens, anew=anew):
            self._set_reached()

    def close(self) -> None:
        """Give the compiled model, the cache and the buffers back."""
        self._is_open = False
        self._parked.free()
        self._source.close()
        # The request points into what is held, and the model into the mapped weights: they go first.
        self._request = self._compiled = None
        self._weights = self._head = self._embeddings = None
        self._held.clear()
        self._cache = None

    def _bind_cache(self) -> None:
        """Make the rotary factors, and give the request the blocks of each layer's keys and values."""
        n_ctx = self._spec.n_ctx
        self._rotary = rotary_factors(self._config, _capacity(n_ctx), n_ctx)
        for name, array in self._cache.arrays():
            self._set(name, array)

    def _set_reached(self) -> None:
        """Give the request what a trimmed head adds to its inputs."""
        if self._head is not None:
            for name, array in self._head.inputs.items():
                self._set(name, array)

    def _set(self, name: str, array: NDArray[Any]) -> None:
        self._held[name] = array
        self._request.set_tensor(name, self._ov.Tensor(array, shared_memory=True))


def _capacity(n_ctx: int) -> int:
    """Tokens that a cache needs room for: the padding of the last one too."""
    return n_ctx + MAX_ALIGNMENT - 1


def _group_notes(name: str, blocks: Sequence[int], group: int) -> tuple[str, ...]:
    """What to say of the groups that the plugin quantises activations in, for weights in `blocks` (ascending)."""
    if group > blocks[0]:
        return (
            f"{name}: OpenVINO takes groups of {group}, the weights have blocks of {blocks[0]}: expect slow passes",
        )
    if len(blocks) > 1:
        listed = " and ".join([", ".join(map(str, blocks[:-1])), str(blocks[-1])])
        return (f"{name}: blocks of {listed}: OpenVINO quantises activations in groups of {group} for all of them",)
    return ()


@cache
def _core() -> Any:
    """The process's one runtime. Its plugin gives the thread a stack for signals, and takes it back when it goes: of
    two runtimes, the one that goes last restores what the first has freed, and the next signal ends the process.
    """
    import openvino

    return openvino.Core()


def import_library() -> Any:
    """The openvino package; BackendUnavailableError, with the command that installs it, where there is none."""
    try:
        import openvino
    except ImportError as exc:
        raise BackendUnavailableError('the openvino backend needs OpenVINO: pip install "edge-spec[openvino]"') from exc
    return openvino


@contextmanager
def _translated(ov: Any, doing: str) -> Iterator[None]:
    """Turn OpenVINO's exceptions (RuntimeErrors, and the binding's own TypeErrors), and a want of memory, which for
    mapped pages is an OSError, into BackendError."""
    try:
        yield
    except (MemoryError, OSError, RuntimeError, TypeError, ValueError) as exc:
        if isinstance(exc, (MemoryError, OSError)) or "bad_alloc" in str(exc):
            raise BackendMemoryError(f"not enough memory for {doing}; {MEMORY_REMEDY}") from exc
        raise BackendError(f"OpenVINO {ov.__version__} failed while {doing}: {exc}") from exc
