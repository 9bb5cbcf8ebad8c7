"""The estimate of a cell, and how it stands to what was measured."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from edge_spec.export.exporter import ensure_export
from edge_spec.export.finished import export_key
from edge_spec.export.folder import is_export
from edge_spec.export.recipe import RECIPES, Recipe
from edge_spec.export.source import default_recipe_of
from edge_spec.memory import Estimate, ModelFacts, Settings, estimate, facts_of_export, facts_of_gguf, runtime
from edge_spec.memory.estimate import band_bytes
from edge_spec.memory.exporting import export_bytes
from edge_spec.memory.weights import stored_bytes, stored_matrices
from edge_spec.store import Store
from memory_bench.cell import Cell
from memory_bench.measure import Measured

MIB = 1 << 20
_LOG_STEP = round(0.01 * MIB)
"""llama.cpp's log rounds to this."""


@dataclass(frozen=True, slots=True)
class Foretold:
    """What is known of a cell before it runs. `stored_weight_bytes`: of the exports, from the sources' headers."""

    estimate: Estimate
    stored_weight_bytes: int
    export_bytes: int = 0
    """What the process holds while it exports, of a cell that does only that."""

    @property
    def peak_bytes(self) -> int:
        """The most anonymous memory."""
        return self.export_bytes or self.estimate.peak_bytes

    @property
    def band_bytes(self) -> int:
        """How far above it the run may come."""
        return band_bytes(self.peak_bytes)

    def sum_of(self, name: str, kind: str = "committed_bytes") -> int:
        """One part of target and draft together."""
        return sum(getattr(part, kind) for part in self.estimate.components if part.name == name)


def foretell(cell: Cell, store: Store, *, path_of: dict[str, Path]) -> Foretold:
    """The estimate of a cell; its exports are made first if there are none, so that the run that follows makes none.

    `path_of`: files of models that are not in the store.
    """
    if cell.recipe is not None:
        return _foretell_export(cell, store, path_of)
    draft_backend = "onnx" if cell.backend == "openvino" else cell.backend
    target, stored = _facts(cell.model, cell.backend, None, store, path_of)
    draft = None
    if cell.draft:
        draft, more = _facts(cell.draft, draft_backend, RECIPES["draft"], store, path_of)
        stored += more
    settings = Settings(
        backend=cell.backend,
        n_ctx=cell.n_ctx,
        kv=cell.kv,
        batch=cell.batch,
        max_rows=cell.rows,
        threads=cell.threads,
        lookup=cell.is_plain and not cell.draft,
    )
    return Foretold(estimate(target, draft, settings), stored)


def _foretell_export(cell: Cell, store: Store, path_of: dict[str, Path]) -> Foretold:
    assert cell.recipe is not None
    recipe = RECIPES[cell.recipe]
    facts = facts_of_gguf(store.resolve(path_of.get(cell.model, cell.model)).path, name=cell.model)
    counted = estimate(facts, None, Settings(n_ctx=cell.n_ctx, threads=cell.threads, recipe=recipe))
    held = runtime.PYTHON + export_bytes(facts, cell.threads)
    return Foretold(counted, stored_bytes(stored_matrices(facts, recipe)), held)


def _facts(
    name: str, backend: str, recipe: Recipe | None, store: Store, path_of: dict[str, Path]
) -> tuple[ModelFacts, int]:
    """Facts of the export where there will be one, else of the GGUF; and the bytes that its weights are said to take,
    from the header of the GGUF alone."""
    local = store.resolve(path_of.get(name, name))
    if backend == "llama":
        return facts_of_gguf(local.path, name=name), 0
    recipe = recipe or default_recipe_of(local.path)
    stored = stored_bytes(stored_matrices(facts_of_gguf(local.path, name=name), recipe))
    folder = store.exports_dir / local.sha256 / f"{recipe.name}-{export_key(recipe)}"
    if not is_export(folder):
        ensure_export(local.path, local.sha256, recipe, store.exports_dir)
    return replace(facts_of_export(folder), name=name), stored


@dataclass(frozen=True, slots=True)
class Compared:
    """One cell: foretold and measured."""

    cell: Cell
    foretold: Foretold
    measured: Measured

    @property
    def peak_bytes(self) -> int:
        """The most anonymous memory that was measured."""
        return self.measured.peak_anonymous_bytes

    @property
    def error_bytes(self) -> int:
        """Estimate less measurement: negative where the estimate was too low."""
        return self.foretold.peak_bytes - self.peak_bytes

    @property
    def error(self) -> float:
        """The same as a share of what was measured."""
        return self.error_bytes / self.peak_bytes

    @property
    def beyond_band(self) -> bool:
        """Whether more was needed than the estimate and its band."""
        return -self.error_bytes > self.foretold.band_bytes

    @property
    def load_error_bytes(self) -> int:
        """The same as `error_bytes` for the peak while loading."""
        if self.cell.recipe is not None:
            return self.error_bytes
        stages = (self.measured.stages[name].peak_anonymous_bytes for name in ("imported", "loaded"))
        return self.foretold.estimate.load_peak_bytes - max(stages)

    def allocated(self) -> dict[str, tuple[int, int]]:
        """Bytes of cache and weights: as the backend told, and as foretold."""
        heard: dict[str, int] = self.measured.facts["heard"]
        told, foretold = heard.get, self.foretold
        if self.cell.recipe is not None:
            return {"weights": (told("stored_weight_bytes", 0), foretold.stored_weight_bytes)}
        found = {"cache": (told("cache_bytes", 0), foretold.sum_of("cache"))}
        if self.cell.backend != "llama":
            return found | {"weights": (told("stored_weight_bytes", 0), foretold.stored_weight_bytes)}
        state = told("state_bytes", 0), foretold.sum_of("recurrent state")
        return (
            found
            | ({"state": state} if any(state) else {})
            | {
                "mapped weights": (told("mapped_weight_bytes", 0), foretold.sum_of("weights", "mapped_bytes")),
                "repacked weights": (told("repacked_bytes", 0), foretold.sum_of("weights")),
            }
        )

    def differences(self) -> dict[str, int]:
        """Bytes of cache and weights that the backend allocated beside what was foretold; empty where they agree.

        llama.cpp is believed to the precision of its log.
        """
        precision = 0 if self.cell.backend != "llama" else _LOG_STEP * (2 if self.cell.draft else 1)
        differences = {name: found - said for name, (found, said) in self.allocated().items()}
        return {name: n_bytes for name, n_bytes in differences.items() if abs(n_bytes) > precision}
