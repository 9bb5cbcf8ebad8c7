"""What an estimate says, against what the exporter writes and the backends allocate."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_spec.backends.native import NativeModel
from edge_spec.backends.onnx import OnnxModel
from edge_spec.errors import UnsupportedArchitectureError, UsageError
from edge_spec.export.exporter import export_model
from edge_spec.export.recipe import RECIPES
from edge_spec.kernels.build import load_library
from edge_spec.kernels.library import CHUNK
from edge_spec.kernels.program import Program
from edge_spec.loading import KV_TYPES as LOADABLE
from edge_spec.memory import ModelFacts, Owner, Settings, estimate, facts_of_export, facts_of_gguf
from edge_spec.memory.compute import llama_scheduler_bytes, native_trimmed_head, rope_bytes
from edge_spec.memory.kv import KV_TYPES, cache_bytes, find_kv_type
from edge_spec.memory.weights import native_weights, stored_bytes, stored_matrices
from tests.gguf_builder import write_gguf
from tests.tiny_models import PECULIARITIES, write_tiny_gguf

N_CTX = 100
BUFFERS = "compute buffers"


@pytest.mark.parametrize("architecture", sorted(PECULIARITIES))
@pytest.mark.parametrize("recipe", ["int4", "int8", "exact"])
def test_weight_bytes_from_the_header_are_those_that_the_exporter_writes(
    tmp_path: Path, architecture: str, recipe: str
) -> None:
    source = write_tiny_gguf(
        tmp_path / "m.gguf", architecture=architecture, tensor_type="Q4_0", tensor_types={"ffn_down": "Q6_K"}
    )
    facts = facts_of_gguf(source)

    export = export_model(source, RECIPES[recipe], tmp_path / "export", sha256="0" * 64)

    assert stored_bytes(stored_matrices(facts, RECIPES[recipe])) == export.weight_bytes
    assert stored_bytes(stored_matrices(facts_of_export(export.path), None)) == export.weight_bytes


def test_a_trimmed_head_is_counted_as_it_is_exported(tmp_path: Path) -> None:
    source = write_tiny_gguf(tmp_path / "m.gguf", n_vocab=40_000, n_layer=1, tensor_type="Q4_0", tied=False)

    export = export_model(source, RECIPES["draft"], tmp_path / "export", sha256="0" * 64)

    assert stored_bytes(stored_matrices(facts_of_gguf(source), RECIPES["draft"])) == export.weight_bytes
    assert stored_bytes(stored_matrices(facts_of_export(export.path), None)) == export.weight_bytes


@pytest.mark.parametrize(("backend", "kv"), [("onnx", None), ("native", None), ("native", "f32")])
def test_cache_bytes_are_those_that_the_backend_allocates(
    tmp_path: Path, backend: str, kv: str | None, kernels_dir: Path
) -> None:
    source = write_tiny_gguf(tmp_path / "m.gguf", architecture="gemma2", n_kv_head=1)
    export = export_model(source, RECIPES["int8"], tmp_path / "export", sha256="0" * 64)
    model: OnnxModel | NativeModel
    if backend == "onnx":
        model = OnnxModel(export, name="m", n_ctx=N_CTX, threads=1)
    else:
        options: dict[str, Any] = {} if kv is None else {"kv": kv}
        model = NativeModel(export, name="m", n_ctx=N_CTX, threads=1, kernels_dir=kernels_dir, **options)
    held = [array.nbytes for _, array in model._cache.arrays()]
    model.close()

    assert cache_bytes(facts_of_gguf(source), N_CTX, backend, find_kv_type(kv, backend)) == sum(held)


def arrays_of(program: Program) -> dict[int, int]:
    """Bytes of the arrays that a program made or was given, by their places; views count for what they show a part of,
    and weights stay in the file."""
    found: dict[int, int] = {}
    outputs = [getattr(program, name) for name in ("embeddings", "normed", "logits", "largest", "log_sums", "places")]
    for array in [*outputs, *program._held._held]:
        owner = array
        while isinstance(owner, np.ndarray) and isinstance(owner.base, np.ndarray):
            owner = owner.base
        if isinstance(owner, np.ndarray):
            found[id(owner)] = owner.nbytes
    return found


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "phi3", "gemma2"])
@pytest.mark.parametrize("recipe", ["int4", "int8", "exact", "draft"])
def test_a_native_program_makes_the_arrays_that_are_counted(
    tmp_path: Path, architecture: str, recipe: str, kernels_dir: Path
) -> None:
    n_vocab = 40_000 if recipe == "draft" else 1000  # so that the head is trimmed
    source = write_tiny_gguf(
        tmp_path / "m.gguf", architecture=architecture, n_vocab=n_vocab, tensor_type="Q4_0", n_layer=2
    )
    export = export_model(source, RECIPES[recipe], tmp_path / "export", sha256="0" * 64)
    facts = facts_of_gguf(source)
    settings = Settings(backend="native", n_ctx=N_CTX, batch=CHUNK, max_rows=64, recipe=RECIPES[recipe])
    model = NativeModel(export, name="m", n_ctx=N_CTX, threads=1, kernels_dir=kernels_dir, max_rows=64)
    arrays, head = sum(arrays_of(model._program).values()), model._head
    model.close()

    facts = replace(facts, n_merges=0)  # else some of the arrays lie in what the tokenizer has left
    parts = {part.name: part for part in estimate(facts, None, settings).components if part.owner is Owner.TARGET}
    counted = [parts[name] for name in ("weights", "compute buffers", "logits")]
    assert [part.reserved_bytes for part in counted] == [0, 0, 0]
    beside = native_trimmed_head(export.config, stored_matrices(facts, settings.recipe)[-1].n_rows)
    assert (head is not None) == bool(beside) == (recipe == "draft")
    assert arrays <= sum(part.committed_bytes for part in counted) - beside <= 1.02 * arrays


def test_8_bit_weights_take_nothing_besides_where_the_kernels_take_signs(tmp_path: Path, kernels_dir: Path) -> None:
    matrices = stored_matrices(facts_of_gguf(write_tiny_gguf(tmp_path / "m.gguf")), RECIPES["int8"])

    def beside(machine: str, *features: str) -> int:
        return native_weights(matrices, machine, frozenset(features)).anonymous

    assert beside("x86_64", "avx2") == beside("aarch64", "asimddp") == 0
    assert beside("x86_64", "avx2", "avx512_vnni") == 0, "those kernels use vectors of 32 bytes"
    blocks = sum(matrix.n_rows * matrix.row_length // matrix.block for matrix in matrices)
    needing = [("x86_64", "avx2", "avx_vnni"), ("x86_64", "avx2", "avx512_vnni", "avx512vl"), ("x86_64",), ("aarch64",)]
    assert all(beside(*processor) >= 4 * blocks for processor in needing)
    here = Settings(backend="native")
    assert bool(load_library(kernels_dir).edge_spec_zero8()) == bool(beside(here.machine, *here.cpu_features))


def test_the_largest_context_fits_and_the_next_one_does_not(tmp_path: Path) -> None:
    facts = facts_of_gguf(write_tiny_gguf(tmp_path / "m.gguf", n_ctx=1 << 20))
    counted = estimate(facts, None, Settings(backend="onnx"))
    budget = 1 << 30

    largest = counted.largest_n_ctx(budget)

    assert largest is not None
    assert counted.at(n_ctx=largest).fits(budget)
    assert not counted.at(n_ctx=largest + 1).fits(budget)
    assert counted.largest_n_ctx(1 << 20) is None


def test_llama_cpp_touches_its_cache_while_loading_and_the_others_when_text_is_read(tmp_path: Path) -> None:
    facts = facts_of_gguf(write_tiny_gguf(tmp_path / "m.gguf", n_ctx=1 << 16))

    def more(backend: str) -> int:
        small, large = (estimate(facts, None, Settings(backend=backend, n_ctx=n)) for n in (2048, 32768))
        return large.load_peak_bytes - small.load_peak_bytes

    assert more("llama") == cache_bytes(facts, 32768 - 2048, "llama", find_kv_type(None, "llama"))
    for backend in ("onnx", "native"):
        assert more(backend) <= rope_bytes(facts, 32768) - rope_bytes(facts, 2048)


def test_each_model_on_llama_cpp_sets_a_scheduler_aside(tmp_path: Path) -> None:
    facts = facts_of_gguf(write_tiny_gguf(tmp_path / "m.gguf"))
    alone, pair = (estimate(facts, draft, Settings(backend="llama", threads=1)) for draft in (None, facts))
    assert pair.reserved_bytes - alone.reserved_bytes > llama_scheduler_bytes(facts) > 1024 * 60 * 336


def test_native_arrays_lie_in_what_building_the_targets_tokenizer_has_left(tmp_path: Path) -> None:
    facts = facts_of_gguf(write_tiny_gguf(tmp_path / "m.gguf"))
    few, many = (replace(facts, n_merges=n) for n in (0, 10**6))

    def buffers(target: ModelFacts, owner: Owner) -> int:
        counted = estimate(target, few, Settings(backend="native"))
        return sum(part.committed_bytes for part in counted.components if (part.owner, part.name) == (owner, BUFFERS))

    assert buffers(many, Owner.DRAFT) == buffers(few, Owner.DRAFT) > 0
    assert buffers(many, Owner.TARGET) == 0 < buffers(few, Owner.TARGET)


def test_the_estimate_of_a_file_is_that_of_its_export(tmp_path: Path) -> None:
    source = write_tiny_gguf(tmp_path / "m.gguf", architecture="qwen2", tensor_type="Q4_0")
    export = export_model(source, RECIPES["int4"], tmp_path / "export", sha256="0" * 64)
    settings = Settings(backend="native", recipe=RECIPES["int4"])
    parts = [
        estimate(facts, None, settings).components for facts in (facts_of_gguf(source), facts_of_export(export.path))
    ]
    held = [[(part.name, part.committed_bytes, part.reserved_bytes) for part in told] for told in parts]
    assert held[0] == held[1]


@pytest.mark.parametrize("backend", ["onnx", "native"])
def test_a_draft_counts_in_full(tmp_path: Path, backend: str) -> None:
    facts = facts_of_gguf(write_tiny_gguf(tmp_path / "m.gguf"))
    alone = estimate(facts, None, Settings(backend=backend))

    paired = estimate(facts, facts, Settings(backend=backend))

    drafts = [part for part in paired.components if part.owner is Owner.DRAFT]
    assert {part.name for part in drafts} == {p.name for p in paired.components if p.owner is Owner.TARGET}
    assert paired.committed_bytes - alone.committed_bytes == sum(part.committed_bytes for part in drafts)


def test_an_unknown_architecture_is_refused_by_name(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", {"general.architecture": "perceptron", "perceptron.block_count": 2})

    with pytest.raises(UnsupportedArchitectureError, match="'perceptron'"):
        facts_of_gguf(path)


def test_a_type_of_cache_elements_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    facts = facts_of_gguf(write_tiny_gguf(tmp_path / "m.gguf"))

    with pytest.raises(UsageError, match="q9_0"):
        estimate(facts, None, Settings(kv="q9_0"))


def test_the_types_of_cache_elements_are_those_that_the_engine_takes() -> None:
    assert {backend: tuple(kind.name for kind in kinds) for backend, kinds in KV_TYPES.items()} == LOADABLE


def test_the_estimator_imports_no_exporter() -> None:
    code = (
        "import importlib, pkgutil, sys, edge_spec.memory as memory\n"
        "for module in pkgutil.iter_modules(memory.__path__):\n"
        "    importlib.import_module(f'edge_spec.memory.{module.name}')\n"
        "heavy = {'edge_spec.export.exporter', 'edge_spec.checkpoint.exporter', 'edge_spec.loading', 'onnx'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
