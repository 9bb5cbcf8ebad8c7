"""The doctor's comparison of backends: in turn, in processes of their own, kept for `auto`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import pytest

from edge_spec import backend_choice
from edge_spec.backend_choice import BackendProfile
from edge_spec.doctor import comparison
from edge_spec.doctor.contestant import Contestant, Job, Loaded
from edge_spec.errors import BackendError, UsageError
from edge_spec.loading import installed_backends
from edge_spec.opening import LoadOptions
from edge_spec.processor import cpu_key
from edge_spec.store import Store
from tests.fake_engine import run
from tests.tiny_models import write_tiny_gguf

# Seconds of a target's pass: of one row, and of each further one. A draft takes a fifth.
COSTS = {"onnx": (0.020, 0.010), "openvino": (0.026, 0.002), "llama": (0.040, 0.030)}


class FakeContestant:
    """A backend whose passes cost as COSTS says; refuses to load where it is named in `broken`."""

    log: ClassVar[list[tuple[str, str]]] = []
    broken: ClassVar[set[str]] = set()

    def __init__(self, job: Job) -> None:
        if job.backend in self.broken:
            raise BackendError(f"{job.backend} is broken")
        self._backend, self._share = job.backend, 0.2 if job.is_draft else 1.0
        self.loaded = Loaded(load_s=1.0, recipe="int4", engine=f"{job.backend} 1", row_alignment=None)

    def read(self, tokens: int) -> float:
        self.log.append((self._backend, f"read {tokens}"))
        return tokens * COSTS[self._backend][1] * self._share

    def time(self, rows: list[int], cached: int) -> dict[int, float]:
        self.log.append((self._backend, f"time behind {cached}"))
        one, more = COSTS[self._backend]
        return {n: (one + more * (n - 1)) * self._share for n in rows}

    def memory(self) -> tuple[int, int]:
        return 300 << 20, 100 << 20

    def close(self) -> None:
        self.log.append((self._backend, "closed"))


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGE_SPEC_HOME", str(tmp_path / "home"))
    for module in (comparison, backend_choice):
        monkeypatch.setattr(module, "installed_backends", lambda: tuple(COSTS))
    monkeypatch.setattr(backend_choice, "_engine", lambda name: f"{name} 1")
    monkeypatch.setattr(comparison, "Contestant", FakeContestant)
    monkeypatch.setattr(comparison, "_SETTLE_S", 0)
    monkeypatch.setattr(comparison, "_SECONDS", {"target": 0, "draft": 0})
    FakeContestant.log, FakeContestant.broken = [], set()
    write_tiny_gguf(tmp_path / "model.gguf", n_vocab=512)
    return tmp_path / "model.gguf"


def test_backends_are_compared_in_turn_and_the_choice_is_kept(model: Path) -> None:
    store = Store()
    found = comparison.compare(LoadOptions(target=model, draft=model), store)
    assert found.choice is not None
    assert (found.choice.backend, found.choice.draft_backend) == ("openvino", "onnx")
    assert [did for _, did in FakeContestant.log].count("closed") == 2 * len(COSTS)
    firsts = [backend for backend, did in FakeContestant.log if did.startswith("time")][::3]
    assert firsts[:3] == list(COSTS)  # another one begins each round
    (target, draft) = found.models.values()
    assert [one.pass_s[4] for one in target.figures] == pytest.approx([0.050, 0.032, 0.130])
    assert [one.read_tokens_per_s for one in draft.figures] == pytest.approx([500, 2500, 500 / 3])
    request = BackendProfile(store.cache_dir)
    kept = json.loads((store.cache_dir / "backends.json").read_text("utf-8"))
    assert {key.rpartition(" ")[2] for key in kept} == {"default", "draft"}
    assert all(key.startswith(cpu_key()) for key in kept)
    assert set(request.get(next(iter(kept)).removeprefix(f"{cpu_key()} | "))) == set(COSTS)


def test_a_backend_that_does_not_load_is_left_out_with_the_reason(model: Path) -> None:
    FakeContestant.broken = {"openvino"}
    found = comparison.compare(LoadOptions(target=model), Store())
    assert found.choice is not None
    assert found.choice.backend == "onnx"
    assert found.models["target"].failed == {"openvino": "openvino is broken"}
    FakeContestant.broken = {"onnx", "llama"}
    told = run("doctor", "--compare", "--target", str(model))
    assert told.code == 0, told.err
    assert "onnx is left out: onnx is broken" in told.err
    assert "--backend auto takes openvino" in told.out


def test_where_nothing_loads_the_reasons_are_told(model: Path) -> None:
    FakeContestant.broken = set(COSTS)
    with pytest.raises(
        BackendError, match=r"no backend runs model.*onnx: onnx is broken; openvino: openvino is broken"
    ):
        comparison.compare(LoadOptions(target=model), Store())


def test_the_table_has_every_figure_and_its_ratio(model: Path) -> None:
    shown = run("doctor", "--compare", "--target", str(model), "--draft", str(model))
    assert shown.code == 0, shown.err
    rows = {line.split("  ")[0].strip(): line.split() for line in reversed(shown.out.splitlines())}
    assert rows["4"] == ["4", "50.0", "32.0", "0.64", "130.0", "2.60"]
    assert rows["both, MiB"][2:] == ["400", "400", "1.00", "400", "1.00"]
    assert "--backend auto takes openvino, the draft on onnx from now on" in shown.out
    told = json.loads(
        run("doctor", "--compare", "--only", "draft", "--target", str(model), "--draft", str(model), "--json").out
    )
    assert set(told["models"]) == {"draft"}
    assert told["choice"]["backend"] == "openvino"  # as the run before found
    assert told["models"]["draft"]["figures"][1]["pass_s"]["8"] == pytest.approx(0.008)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--only", "draft"], "--only is for --compare"),
        (["--compare", "--backend", "llama"], "drop --backend"),
        (["--compare", "--draft-backend", "llama"], "drop --backend"),
    ],
)
def test_contradictions_are_refused(options: list[str], message: str) -> None:
    refused = run("doctor", *options)
    assert refused.code == 2
    assert message in refused.err


def test_a_draft_is_compared_where_there_is_one(model: Path) -> None:
    with pytest.raises(UsageError, match="no draft model"):
        comparison.compare(LoadOptions(target=model), Store(), roles=["draft"])


def contestant(model: Path, **changes: Any) -> Contestant:
    job: dict[str, Any] = {
        "model": str(model), "backend": "onnx", "is_draft": False, "threads": 1, "n_ctx": 128, "recipe": None,
        "pad_rows": True,
    }  # fmt: skip
    return Contestant(Job(**(job | changes)))


def test_a_contestant_works_in_a_process_of_its_own(model: Path) -> None:
    ran = contestant(model)
    try:
        assert ran.loaded.engine.startswith("onnxruntime ")
        assert ran.loaded.load_s > 0
        assert ran.read(64) > 0
        anonymous, mapped = ran.memory()
        assert anonymous > 0 < mapped
        assert ran.time([1, 4, 32], 32).keys() == {1, 4, 32}
        with pytest.raises(BackendError, match="window of 128"):
            ran.read(128)
    finally:
        ran.close()


def test_why_a_contestant_does_not_load_comes_back(model: Path) -> None:
    with pytest.raises(BackendError, match="there is no file"):
        contestant(model.with_name("absent.gguf"))


@pytest.mark.real
def test_what_is_compared_is_what_auto_takes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, smollm2_path: Path
) -> None:
    monkeypatch.setenv("EDGE_SPEC_HOME", str(tmp_path))
    monkeypatch.setattr(comparison, "_SECONDS", {"target": 0, "draft": 0})
    monkeypatch.setattr(comparison, "READ", 160)
    monkeypatch.setattr(comparison, "ROWS", (1, 2, 4, 8))
    shown = run("doctor", "--compare", "--target", str(smollm2_path), "--json")
    assert shown.code == 0, shown.err
    told = json.loads(shown.out)
    assert [one["backend"] for one in told["models"]["target"]["figures"]] == list(installed_backends())
    written = run("generate", "Hello", "--target", str(smollm2_path), "--backend", "auto", "-n", "4", "--json")
    assert written.code == 0, written.err
    assert json.loads(written.out)["backend"] == told["choice"]["backend"]
