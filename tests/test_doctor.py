"""The doctor: how passes are timed, what is recommended, and what later engines take over."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from edge_spec.assembly import KeptLessons
from edge_spec.cache_file import CacheFile
from edge_spec.cores import RecommendedThreads, usable_processors
from edge_spec.doctor.examination import LONG, SHORT, ModelTimes, _best, costs_from
from edge_spec.doctor.passes import PassTime, fill, time_passes
from edge_spec.drafting import Costs, Growth
from edge_spec.store import Store
from tests.fake_engine import run
from tests.fakes import FakeLM
from tests.test_planner import Clock, TimedLM


def test_passes_are_timed_behind_what_is_cached_and_leave_it() -> None:
    clock = Clock()
    model = TimedLM(clock, 0.030, 0.002, n_ctx=200, max_rows=4)
    assert fill(model, 100, clock) == pytest.approx(100 / (0.030 + 99 * 0.002))
    times = time_passes(model, (1, 2, 8), repeats=3, clock=clock)
    assert [(time.cached, time.rows) for time in times] == [(100, 1), (100, 2), (100, 8)]
    assert [time.seconds for time in times] == pytest.approx([0.030, 0.032, 0.044])
    assert model.length == 100


def test_timing_ends_with_its_budget_but_not_before_the_first_round() -> None:
    clock = Clock()
    model = TimedLM(clock, 1.0, 0.0, n_ctx=64)
    times = time_passes(model, (1, 2), repeats=100, budget_s=0.1, clock=clock)
    assert len(times) == 2
    assert clock.now == pytest.approx(3.0)  # one to warm up, and a round of two


@pytest.mark.parametrize(
    ("times", "best"),
    [({1: 0.2, 2: 0.1}, 2), ({1: 0.100, 2: 0.099}, 1), ({2: 0.1, 4: 0.2}, 2), ({1: 0.3, 2: 0.2, 4: 0.1}, 4)],
)
def test_more_threads_have_to_be_worth_it(times: dict[int, float], best: int) -> None:
    assert _best(times) == best


def test_a_recommendation_holds_for_its_machine_only(tmp_path: Path) -> None:
    threads = RecommendedThreads(tmp_path)
    assert threads.get("this") is None
    threads.put("this", 1)
    threads.put("a larger one", usable_processors() + 1)
    assert (threads.get("this"), threads.get("another")) == (1, None)
    assert threads.get("a larger one") is None


def test_the_best_fixed_length_follows_cost_and_chance() -> None:
    costs = Costs(max_rows=8)
    costs.restore({"target": {str(n): 0.020 + 0.010 * n for n in range(1, 9)}, "draft_s": 0.005, "read_s": 0.001})
    plain = 1 / 0.030
    rate, length = costs.best_fixed(0.0, 7)
    assert rate == pytest.approx(plain)
    assert length == 0
    rate, length = costs.best_fixed(1.0, 7)
    assert rate == pytest.approx(8 / (0.100 + 7 * 0.005))
    assert length == 7
    rates = [costs.best_fixed(chance / 10, 7)[0] for chance in range(11)]
    assert rates == sorted(rates)
    assert costs.best_fixed(1.0, 7, reading_s=9.0)[1] == 0


def times_of(passes: list[PassTime]) -> ModelTimes:
    return ModelTimes("a model", "onnx", "int4", 2, 500.0, tuple(passes))


def test_passes_at_other_lengths_cost_what_lies_on_the_line_through_both_that_were_timed() -> None:
    spec = replace(FakeLM().spec, max_rows=8, row_alignment=2, kv_bytes_per_token=100, weight_bytes=10**6)
    growth = Growth.guess(spec.kv_bytes_per_token, spec.weight_bytes)

    def seconds(rows: int, cached: int) -> float:
        return 0.030 + 0.009 * rows + 1.5 * growth.passes(rows, cached) * 0.048  # a pass of two rows: the narrowest

    def draft_seconds(rows: int, cached: int) -> float:
        return 0.010 + 0.001 * rows + 0.8 * growth.passes(rows, cached) * 0.011

    def passes(widths: Sequence[int], cost: Callable[[int, int], float]) -> list[PassTime]:
        return [PassTime(cached, n, cost(n, cached)) for cached in (SHORT, LONG) for n in widths]

    model = SimpleNamespace(model=SimpleNamespace(spec=spec))
    opened: Any = SimpleNamespace(target=model, draft=model)
    timed = times_of(passes((2, 4, 8, 16, 32), seconds)), times_of(passes((1, 2, 4), draft_seconds))
    costs = costs_from(opened, *timed)
    for cached in (0, SHORT, LONG, 3000):
        costs.move(cached)
        for rows in (2, 4, 8):
            assert costs.target_s(rows) == pytest.approx(seconds(rows, cached))
        assert costs.draft_s == pytest.approx(draft_seconds(1, cached))


def test_where_one_length_was_timed_the_guess_of_the_other_stays() -> None:
    opened: Any = SimpleNamespace(target=SimpleNamespace(model=FakeLM(max_rows=4)), draft=None)
    known = costs_from(opened, times_of([PassTime(SHORT, n, 0.03 + 0.01 * n) for n in (1, 2, 4)]), None).to_json()
    assert "growth" not in known


@pytest.mark.real
def test_what_the_doctor_measures_is_where_later_engines_start(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, smollm2_path: Path
) -> None:
    monkeypatch.setenv("EDGE_SPEC_HOME", str(tmp_path))
    transcript = run("doctor", "--target", str(smollm2_path), "--json")
    assert transcript.code == 0, transcript.err
    told = json.loads(transcript.out)
    assert {p["rows"] for p in told["target"]["passes"]} >= {16, 32}
    assert told["draft"] is None
    assert told["target"]["reading_tokens_per_s"] > 0
    assert told["read_bandwidth_bytes_per_s"] > 1e8
    cache = Store().cache_dir
    (kept,) = json.loads((cache / "costs.json").read_text("utf-8")).values()
    costs = Costs(max_rows=16, alignment=int(min(kept["target"], key=int)))
    costs.restore(kept)
    costs.move(SHORT)
    assert 1 / costs.target_s(1) == pytest.approx(told["plain_tokens_per_s"], rel=0.01)
    assert set(json.loads((cache / "threads.json").read_text("utf-8")).values()) == {told["threads"]}


def test_measured_costs_replace_costs_and_leave_what_is_known_of_texts(tmp_path: Path) -> None:
    cache = CacheFile(tmp_path / "costs.json")
    cache.put("pair", {"target": {"1": 0.5}, "growth": [0.1, 0.1], "lengths": [5], "chances": {"model": {}}})
    costs, kept = Costs(max_rows=16), KeptLessons(cache, "pair")
    kept.put(costs)
    assert cache.get("pair")["target"] == {"1": 0.5}, "nothing was measured"
    costs.observe_target(1, 0.03)
    kept.put(costs)
    entry = cache.get("pair")
    assert "growth" not in entry
    assert (entry["target"]["1"], entry["lengths"], entry["chances"]) == (pytest.approx(0.03), [5], {"model": {}})
