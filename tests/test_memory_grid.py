"""The memory grid measures what a process holds, and compares it with the estimate honestly."""

from __future__ import annotations

import mmap
import os
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import memory_grid
import pytest
from memory_bench.cell import Cell, full_grid
from memory_bench.foretell import MIB, Compared, Foretold, foretell
from memory_bench.heard import sum_lines
from memory_bench.limits import SHARES, Outcome, run_limited
from memory_bench.measure import Measured, measure
from memory_bench.proc import Memory, read_memory, reset_peak, resident_by_kind
from memory_bench.random_models import MODELS
from memory_bench.report import as_text, figures

from edge_spec.export.exporter import ensure_export
from edge_spec.export.recipe import RECIPES
from edge_spec.memory import Settings, estimate, facts_of_gguf
from edge_spec.store import Store
from tests.tiny_models import write_tiny_gguf

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

PAIR_ON_LLAMA = "qwen2.5-coder-1.5b llama 1024 draft=qwen2.5-coder-0.5b"
LOG = [
    "load_tensors:   CPU_Mapped model buffer size =   462.96 MiB\n",
    "load_tensors:   CPU_REPACK model buffer size =    28.05 MiB\n",
    "llama_context:        CPU  output buffer size =     0.58 MiB\n",
    "llama_kv_cache:        CPU KV buffer size =    48.00 MiB\n",
    "sched_reserve:        CPU compute buffer size =    39.51 MiB\n",
    "~llama_context:        CPU compute buffer size is  39.5120 MiB, matches expectation of  39.5120 MiB\n",
]


def test_the_log_of_two_models_is_summed_by_purpose() -> None:
    found = sum_lines([*LOG, *LOG])
    assert found["cache_bytes"] == 96 * MIB
    assert found["mapped_weight_bytes"] == 2 * round(462.96 * MIB)
    assert found["repacked_bytes"] == 2 * round(28.05 * MIB)
    assert found["compute_bytes"] == 2 * round(39.51 * MIB)


def test_every_cell_has_a_name_of_its_own() -> None:
    cells = list(full_grid(memory_grid.BACKENDS, {name: model.backends for name, model in MODELS.items()}))
    assert len({cell.name for cell in cells}) == len(cells)


@linux_only
def test_memory_that_is_touched_and_given_back_is_in_the_peak_and_not_in_the_rest() -> None:
    assert reset_peak()
    before = read_memory()
    assert before is not None
    pages = mmap.mmap(-1, 32 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for offset in range(0, 32 * MIB, mmap.PAGESIZE):
        pages[offset] = 1
    held = read_memory()
    pages.close()
    after = read_memory()
    assert held is not None
    assert after is not None
    assert 31 * MIB < held.anonymous_bytes - before.anonymous_bytes < 34 * MIB
    assert after.anonymous_bytes < held.anonymous_bytes - 31 * MIB
    assert after.peak_anonymous_bytes > after.anonymous_bytes + 28 * MIB  # the mark tells what a sample has missed


@linux_only
def test_resident_memory_by_kind_sums_to_the_whole() -> None:
    kinds = resident_by_kind(os.getpid())
    now = read_memory()
    assert now is not None
    assert kinds["libraries"] > MIB
    assert abs(kinds["anonymous"] - now.anonymous_bytes) < 4 * MIB


@pytest.fixture(scope="module")
def foretold(tmp_path_factory: pytest.TempPathFactory) -> Foretold:
    path = write_tiny_gguf(tmp_path_factory.mktemp("tiny") / "tiny.gguf")
    return Foretold(estimate(facts_of_gguf(path), None, Settings(n_ctx=128)), 1000)


def compared(foretold: Foretold, peak_bytes: int, *, name: str = "m", cache: int | None = None) -> Compared:
    heard = {"cache_bytes": foretold.sum_of("cache") if cache is None else cache, "stored_weight_bytes": 1000}
    stages = {name: Memory(anonymous_bytes=peak_bytes) for name in ("imported", "loaded", "generated")}
    measured = Measured(stages=stages, facts={"stage": "generated", "heard": heard})
    return Compared(Cell(model=name, backend="onnx", n_ctx=128), foretold, measured)


class TestFigures:
    def test_an_exact_estimate_has_no_error(self, foretold: Foretold) -> None:
        found = figures([compared(foretold, foretold.estimate.peak_bytes)])
        assert (found["median_error"], found["worst_underestimate_bytes"], found["beyond_band"]) == (0, 0, [])

    def test_an_underestimate_beyond_the_band_is_named(self, foretold: Foretold) -> None:
        most = foretold.estimate.peak_bytes + foretold.estimate.band_bytes
        found = figures([compared(foretold, most), compared(foretold, most + MIB, name="worse")])
        assert found["beyond_band"] == ["worse onnx 128"]
        assert found["worst_underestimate_bytes"] == foretold.estimate.band_bytes + MIB

    def test_the_95th_percentile_leaves_one_in_twenty_out(self, foretold: Foretold) -> None:
        peak = foretold.estimate.peak_bytes
        results = [compared(foretold, peak)] * 19 + [compared(foretold, 2 * peak)]
        assert figures(results)["p95_error"] == 0
        assert figures([*results[:18], *[results[-1]] * 2])["p95_error"] == 0.5

    def test_another_cache_than_was_foretold_is_told_to_the_byte(self, foretold: Foretold) -> None:
        result = compared(foretold, MIB, cache=foretold.sum_of("cache") + 1)
        assert result.differences() == {"cache": 1}
        assert "cache +1 B" in as_text([result])

    def test_llama_cpp_is_believed_to_the_precision_of_its_log(self, foretold: Foretold) -> None:
        heard = {
            "cache_bytes": foretold.sum_of("cache") + 5000,
            "mapped_weight_bytes": foretold.sum_of("weights", "mapped_bytes"),
            "repacked_bytes": foretold.sum_of("weights") + 20000,
        }
        result = compared(foretold, MIB)
        result.measured.facts["heard"] = heard
        result = replace(result, cell=replace(result.cell, backend="llama"))
        assert result.differences() == {"repacked weights": 20000}


class TestOutcomes:
    CELL = Cell(model="m", backend="onnx", n_ctx=128)

    def outcome(self, share: float, exit_code: int = 0, **facts: Any) -> Outcome:
        return Outcome(self.CELL, "cgroup", share, MIB, Measured(facts=facts, exit_code=exit_code))

    def test_a_signal_is_a_kill_at_any_limit(self) -> None:
        outcome = self.outcome(0.85, -9)
        assert (outcome.word, outcome.good) == ("killed", False)

    def test_a_traceback_is_no_refusal(self) -> None:
        outcome = self.outcome(0.85, 1, stage="imported")
        assert (outcome.word, outcome.good) == ("crashed", False)

    @pytest.mark.parametrize(("share", "good"), [(1.0, False), (0.85, True)])
    def test_a_typed_error_is_good_only_with_less_than_was_estimated(self, share: float, good: bool) -> None:
        outcome = self.outcome(share, stage="refused", error="MemoryBudgetError", message="too little")
        assert (outcome.word, outcome.good) == ("refused", good)
        assert outcome.said == "MemoryBudgetError: too little"

    @pytest.mark.parametrize("less", [{"n_ctx": 64}, {"finish_reason": "memory"}])
    def test_a_run_with_less_is_degraded(self, less: dict[str, Any]) -> None:
        whole: dict[str, Any] = {"stage": "generated", "n_ctx": 128, "draft": None, "finish_reason": "length"}
        assert self.outcome(1.0, **whole).word == "finished"
        assert self.outcome(1.0, **{**whole, **less}).word == "degraded"


class TestCommand:
    def test_cells_are_listed_by_what_is_in_their_names(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert memory_grid.main(["--list", "--backends", "llama", "--only", "smollm2", "--only", " 256,rows=64"]) == 0
        names = capsys.readouterr().err.splitlines()
        assert "smollm2-135m llama 256" in names
        assert all("llama" in name and ("256" in name or "rows=64" in name) for name in names)

    def test_limits_are_for_chosen_cells_unless_others_are_named(self, capsys: pytest.CaptureFixture[str]) -> None:
        def listed(*arguments: str) -> list[str]:
            memory_grid.main(["--list", "--limits", "--backends", "llama", *arguments])
            return capsys.readouterr().err.splitlines()

        assert listed() == [f"smollm2-135m llama {n_ctx}" for n_ctx in (256, 2048, 4096)] + [PAIR_ON_LLAMA]
        assert len(listed("--only", "smollm2-135m llama 2048")) > 1

    def test_no_such_cell_is_bad_usage(self) -> None:
        assert memory_grid.main(["--only", "no such model"]) == 2

    def test_an_unknown_backend_is_bad_usage(self) -> None:
        with pytest.raises(SystemExit, match="2"):
            memory_grid.main(["--backends", "cuda"])


@pytest.mark.real
@linux_only
@pytest.mark.parametrize("backend", ["llama", "native", "onnx"])
def test_what_loading_leaves_behind_is_foretold(backend: str, smollm2_path: Path) -> None:
    cell = Cell(model="smollm2-135m", backend=backend, n_ctx=1024)  # llama.cpp's cache takes 22 MiB of it
    store = Store()  # an export that the measured process makes itself leaves more behind
    ensure_export(smollm2_path, store.resolve("smollm2-135m").sha256, RECIPES["int4"], store.exports_dir)
    measure(cell)  # the first load of an export runs its row check too, with buffers that else come with the answer
    compared = Compared(cell, foretell(cell, Store(), path_of={}), measure(cell))
    assert compared.measured.finished, compared.measured.error
    assert abs(compared.load_error_bytes) <= 8 * MIB


@pytest.mark.real
@linux_only
def test_a_full_window_on_native_is_foretold(smollm2_path: Path) -> None:
    cell = Cell(model="smollm2-135m", backend="native", n_ctx=256)
    measure(cell)  # the kernels are compiled at the first use
    compared = Compared(cell, foretell(cell, Store(), path_of={}), measure(cell))
    assert compared.measured.finished, compared.measured.error
    assert compared.differences() == {}
    assert abs(compared.error) <= 0.07


@pytest.mark.real
@linux_only
def test_what_was_estimated_is_enough_and_with_less_to_allocate_nothing_is_killed(smollm2_path: Path) -> None:
    cell = Cell(model="smollm2-135m", backend="onnx", n_ctx=256)
    drafted = Cell(model="smollm2-135m", backend="llama", n_ctx=256, draft="smollm2-135m")
    (outcome,) = islice(run_limited(drafted, foretell(drafted, Store(), path_of={})), 1)
    assert outcome.good, f"{outcome.kind} with a draft on llama: {outcome.word}; {outcome.said}"
    # RLIMIT_DATA at each share, then the whole in a control group; one with less kills what was not planned for it.
    for outcome in islice(run_limited(cell, foretell(cell, Store(), path_of={})), len(SHARES) + 1):
        assert outcome.good, f"{outcome.kind} at {outcome.share}: {outcome.word}; {outcome.said}"
