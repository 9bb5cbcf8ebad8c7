"""ONNX Runtime on exports in optimum's layout: the cache goes in as past tensors and comes out as present ones.

Past and present cannot share memory here, so every pass copies the cache, and a rollback copies what it keeps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_spec.backends._cache_limits import check_decoded, check_evicted, check_parks, check_resized
from edge_spec.backends._onnx_session import import_library, session_options, translated
from edge_spec.backends._padded_model import PaddedModel
from edge_spec.backends._parked_here import ParkedHere
from edge_spec.backends.alignment import MAX_ALIGNMENT, round_up
from edge_spec.backends.base import Parked
from edge_spec.backends.top_k import top_k
from edge_spec.checkpoint.exporter import GraphExport
from edge_spec.types import Decoded, Logits, ModelSpec, Output

Cache = dict[str, NDArray[np.float32]]


class ParkedCache:
    """The arrays that a pass left; implements `base.Parked`. Nothing writes to them, so the cache may be the same."""

    def __init__(self, arrays: Cache, length: int) -> None:
        self.arrays = arrays
        self._length = length

    @property
    def length(self) -> int:
        """Number of its tokens."""
        return self._length

    @property
    def n_bytes(self) -> int:
        """Bytes of the arrays: after the next pass the cache has others."""
        return sum(array.nbytes for array in self.arrays.values())

    @property
    def is_free(self) -> bool:
        """Whether it was given back, or is the cache again."""
        return not self.arrays

    def free(self) -> None:
        """Give the memory back."""
        self.arrays = {}


class PastPresentModel(PaddedModel):
    """An export that optimum built the graph of; implements `backends.base.CausalLM`.

    `threads` run one operator at a time.
    """

    def __init__(self, export: GraphExport, *, name: str, n_ctx: int, threads: int, max_rows: int = 16) -> None:
        ort = import_library()

        config = export.config
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
            kv_bytes_per_token=2 * config.n_layer * config.n_kv_head * config.head_dim * 4,
            max_rows=round_up(max_rows, MAX_ALIGNMENT),
            row_alignment=None,
            can_resize=True,
            can_park=True,
        )
        super().__init__(spec)
        self._parked: ParkedHere[ParkedCache] = ParkedHere()
        with translated(f"loading {name}"):
            self._session: Any = ort.InferenceSession(
                str(export.model_file),
                session_options(ort, threads),
                providers=["CPUExecutionProvider"],
                enable_fallback=0,  # it would print to standard output and try the same again
            )
            self._inputs = {value.name for value in self._session.get_inputs()}
            self._outputs = [value.name for value in self._session.get_outputs()]
        self._past_names = [name for name in self._outputs if name != "logits"]
        self._cache = self._empty()

    def decode(self, tokens: Sequence[int], *, rows: int = 1, want: Output = Output.LOGITS) -> Decoded:
        """See `CausalLM.decode`."""
        self._require_open()
        n, start = len(tokens), self._length
        check_decoded(self._spec, n, rows, start)
        ids = self._padded(tokens)
        padded = len(ids)
        feeds: dict[str, Any] = {
            "input_ids": ids[None],
            "attention_mask": np.ones((1, start + padded), np.int64),
            # Padding takes the last token's place, since there may be none behind it.
            "position_ids": np.minimum(np.arange(start, start + padded), start + n - 1)[None],
            "rows": self._wanted(n, rows),
        }
        feeds = {name: value for name, value in feeds.items() if name in self._inputs}
        past = {name.replace("present", "past_key_values"): self._kept(name) for name in self._past_names}
        with translated(f"decoding {n} tokens"):
            logits, *present = self._session.run(["logits", *self._past_names], {**feeds, **past})
        self._cache = dict(zip(self._past_names, present, strict=True))
        self._length = start + n
        picked: Logits = logits[0, :rows] if "rows" in self._inputs else logits[0, n - rows : n]
        return Decoded(picked) if want is Output.LOGITS else Decoded(picked[:0], top_k(picked))

    def evict(self, start: int, end: int) -> None:
        """See `CausalLM.evict`: refused, since how such a graph makes positions count is its own affair."""
        self._require_open()
        check_evicted(self._spec, start, end, self._length)

    def resize(self, n_ctx: int) -> None:
        """See `CausalLM.resize`: only a bound, since the cache is as long as its tokens anyway."""
        self._require_open()
        check_resized(self._spec, self._length, n_ctx)
        self._spec = replace(self._spec, n_ctx=n_ctx)

    @property
    def park_bytes(self) -> int:
        """See `CausalLM.park_bytes`: what is parked lasts longer than it would, and counts from now on."""
        return self._length * self._spec.kv_bytes_per_token

    def park(self) -> Parked:
        """See `CausalLM.park`."""
        self._require_open()
        check_parks(self._spec)
        with translated(f"setting {self._length} tokens aside"):
            return self._parked.add(ParkedCache({name: self._kept(name) for name in self._past_names}, self._length))

    def resume(self, parked: Parked) -> None:
        """See `CausalLM.resume`."""
        self._require_open()
        taken = self._parked.check(self._spec, parked)
        self._cache, self._length = taken.arrays, taken.length
        taken.free()

    def swap(self, parked: Parked) -> Parked:
        """See `CausalLM.swap`."""
        self._require_open()
        return self._parked.swap(self, parked)

    def close(self) -> None:
        """Give the session and the cache back."""
        self._is_open = False
        self._parked.free()
        self._session = None
        self._cache = {}

    def _empty(self) -> Cache:
        shape = (1, self._spec.n_kv_heads, 0, self._spec.head_dim)
        return {name: np.zeros(shape, np.float32) for name in self._past_names}

    def _kept(self, name: str) -> NDArray[np.float32]:
        """A cache tensor without what lies behind the length: padding, and what was rolled back; no view of that."""
        cached = self._cache[name]
        return cached if cached.shape[2] == self._length else cached[:, :, : self._length].copy()
