"""The parts of one model on one backend."""

from __future__ import annotations

from collections.abc import Callable

from edge_spec.backends.alignment import MAX_ALIGNMENT
from edge_spec.errors import UsageError
from edge_spec.export.graph import StoredMatrix
from edge_spec.export.recipe import Recipe
from edge_spec.kernels.library import CHUNK
from edge_spec.memory import compute, runtime
from edge_spec.memory.exporting import export_bytes
from edge_spec.memory.facts import ModelFacts, Origin
from edge_spec.memory.kv import cache_bytes, find_kv_type, state_bytes
from edge_spec.memory.parts import Component, Owner, Settings, Source
from edge_spec.memory.weights import (
    head_rows,
    llama_weights,
    native_weights,
    onnx_weights,
    openvino_weights,
    stored_matrices,
)


def model_parts(
    owner: Owner, backend: str, facts: ModelFacts, settings: Settings, recipe: Recipe | None
) -> list[Component]:
    """What `facts` holds on `backend`. `recipe`: how its export is stored, None for the default or a finished one."""
    kinds: dict[str, Callable[[_Model], list[Component]]] = {
        "onnx": _onnx_parts,
        "native": _native_parts,
        "openvino": _openvino_parts,
        "llama": _llama_parts,
    }
    return kinds[backend](_Model(owner, backend, facts, settings, recipe))


class _Model:
    """One model with what its parts have in common."""

    def __init__(
        self, owner: Owner, backend: str, facts: ModelFacts, settings: Settings, recipe: Recipe | None
    ) -> None:
        self.owner = owner
        self.backend = backend
        self.facts = facts
        self.settings = settings
        self.recipe = recipe

    def part(self, name: str, committed: int = 0, **fields: int | bool | Source) -> Component:
        return Component(owner=self.owner, name=name, committed_bytes=committed, **fields)  # type: ignore[arg-type]

    def matrices(self) -> tuple[StoredMatrix, ...]:
        return stored_matrices(self.facts, self.recipe)

    def cache(self) -> Component:
        settings = self.settings
        kv = find_kv_type(settings.kv, self.backend)
        n_bytes = cache_bytes(
            self.facts, settings.n_ctx, self.backend, kv, full_windows=settings.full_windows, batch=settings.batch
        )
        # llama.cpp writes zeros to its cache when it makes it (`llama-kv-cache.cpp`).
        # OpenVINO's is a pool with the parked blocks, and with a second cache that an eviction may need for a moment.
        # What is parked is the process's part, once; only the pool of a second model is more than that.
        reserved = 0
        if self.backend == "openvino" and settings.parked:
            second = self.owner is Owner.DRAFT and settings.backend == "openvino"
            reserved = n_bytes + (settings.parked if second else 0)
        return self.part("cache", n_bytes, filled_later=self.backend != "llama", reserved_bytes=reserved)

    def library(self) -> Component:
        n_bytes = runtime.SESSION[self.backend] + runtime.SESSION_PER_LAYER[self.backend] * self.facts.n_layer
        if self.backend == "llama":
            n_bytes += runtime.LLAMA_VOCABULARY_PER_TOKEN * self.facts.n_vocab
        return self.part("session", n_bytes, source=Source.MEASURED)

    def embedding(self) -> Component:
        """The table stays in the mapped GGUF; a pass dequantises the rows of its tokens, and some are kept."""
        table, batch = self.facts.embedding, self.settings.batch + MAX_ALIGNMENT
        if self.backend == "native":  # in passes of its own, of so many at most
            batch = min(batch, CHUNK)
        return self.part(
            "embedding",
            (3 * batch + runtime.KEPT_EMBEDDINGS) * self.facts.hidden * 4,
            mapped_bytes=table.n_bytes,
            touched_bytes=table.row_bytes,
            filled_later=True,
        )

    def logits(self, matrices: tuple[StoredMatrix, ...]) -> Component:
        facts, rows = self.facts, head_rows(self.facts, matrices)
        if rows < facts.n_vocab:  # a draft's, of which nobody asks for rows as long as the vocabulary
            n_bytes = compute.trimmed_head_bytes(facts, rows, self.settings.max_rows, runtime.REACHED_ROWS)
        else:
            n_bytes = compute.logits_bytes(facts.n_vocab, self.settings.max_rows)
        return self.part("logits", n_bytes, filled_later=True)


def _onnx_parts(model: _Model) -> list[Component]:
    facts, settings = model.facts, model.settings
    matrices = model.matrices()
    weights = onnx_weights(matrices, settings.machine)
    activations = compute.onnx_activations(facts, settings.batch)
    activations += compute.onnx_attention(facts, settings.n_ctx, settings.batch)
    return [
        model.part(
            "weights",
            weights.anonymous,
            mapped_bytes=weights.mapped,
            touched_bytes=weights.touched,
            load_bytes=export_bytes(facts, settings.threads),
        ),
        model.cache(),
        model.part("rotary tables", compute.rope_bytes(facts, settings.n_ctx)),
        model.part(
            "compute buffers",
            activations,
            reserved_bytes=3 * activations // 2,
            source=Source.MEASURED,
            filled_later=True,
        ),
        model.logits(matrices),
        model.embedding(),
        model.library(),
    ]


def _native_parts(model: _Model) -> list[Component]:
    facts, settings, config = model.facts, model.settings, model.facts.config
    matrices = model.matrices()
    assert config is not None, "what has matrices has a decoder"
    weights = native_weights(matrices, settings.machine, settings.cpu_features)
    buffers, whole = (compute.native_activations(config, matrices, n) for n in (settings.batch, CHUNK))
    # The draft shares the target's tokenizer, and the memory that building it has left free is taken by then.
    reused = runtime.NATIVE_REUSED_PER_MERGE * facts.merges if model.owner is Owner.TARGET else 0
    rows = head_rows(facts, matrices)
    allocated, touched = compute.native_logits(config, rows, settings.max_rows)
    logits = touched + compute.native_trimmed_head(config, rows)
    return [
        model.part(
            "weights",
            weights.anonymous + compute.native_vectors(config),
            mapped_bytes=weights.mapped,
            touched_bytes=weights.touched,
            load_bytes=export_bytes(facts, settings.threads),
        ),
        model.cache(),
        model.part("rotary tables", compute.rope_bytes(facts, settings.n_ctx)),
        model.part("compute buffers", max(0, buffers - reused), reserved_bytes=whole - buffers, filled_later=True),
        model.part("logits", logits, reserved_bytes=allocated - touched, filled_later=True),
        model.embedding(),
        model.library(),
    ]


def _openvino_parts(model: _Model) -> list[Component]:
    facts, settings = model.facts, model.settings
    if facts.config is not None:
        from edge_spec.backends._openvino_limits import check_expressible

        check_expressible(facts.config, facts.name)
    matrices = model.matrices()
    weights = openvino_weights(matrices)
    activations = compute.openvino_activations(facts, settings.batch)
    attention = compute.openvino_attention(facts, settings.n_ctx)
    return [
        model.part(
            "weights",
            weights.anonymous,
            mapped_bytes=weights.mapped,
            load_bytes=export_bytes(facts, settings.threads),
        ),
        model.cache(),
        model.part("rotary tables", 2 * compute.rope_bytes(facts, settings.n_ctx)),
        model.part(
            "compute buffers",
            activations + attention,
            reserved_bytes=3 * activations // 2,
            source=Source.MEASURED,
            filled_later=True,
        ),
        model.logits(matrices),
        model.embedding(),
        model.library(),
    ]


def _llama_parts(model: _Model) -> list[Component]:
    facts, settings = model.facts, model.settings
    if facts.origin is Origin.EXPORT:
        raise UsageError(f"{facts.name} is an export; the llama backend runs GGUF files")
    weights = llama_weights(facts, settings.machine, settings.cpu_features)
    allocated, touched = compute.llama_buffers(facts, settings.n_ctx, settings.batch, settings.max_rows)
    reserved = allocated - touched + compute.llama_scheduler_bytes(facts)
    parts = [
        model.part("weights", weights.anonymous, mapped_bytes=weights.mapped, touched_bytes=weights.touched),
        model.cache(),
        model.part("compute buffers", touched, reserved_bytes=reserved, filled_later=True),
        model.part("logits", settings.max_rows * facts.n_vocab * 4, filled_later=True),
        model.library(),
    ]
    if facts.is_recurrent:
        parts.append(model.part("recurrent state", state_bytes(facts)))
    return parts
