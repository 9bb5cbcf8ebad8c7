"""Plans at many budgets: nothing that fits is refused, nothing that does not fit is started."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from edge_spec import Engine
from edge_spec.errors import MemoryBudgetError, UsageError
from edge_spec.memory import Estimate, Settings, estimate, facts_of_gguf
from edge_spec.memory.budget import Bound, Budget, Counts
from edge_spec.memory.plan import (
    LEAST_N_CTX,
    OWN_NOISE_BYTES,
    SHORT_PASS,
    Freedom,
    Plan,
    foreign_bytes,
    make_plan,
    required_bytes,
)
from edge_spec.opening import NEED_MODEL
from tests.tiny_models import write_tiny_gguf

MIB = 1 << 20
ASKED = 32768


@pytest.fixture(scope="module", params=["onnx", "native"])
def wanted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Estimate:
    """A target and a draft with much cache and few weights, so that every rung is worth something."""
    folder = tmp_path_factory.mktemp("models")
    target = write_tiny_gguf(folder / "target.gguf", n_layer=6, hidden=256, n_head=8, n_kv_head=8, ff=1024, n_ctx=65536)
    draft = write_tiny_gguf(folder / "draft.gguf", n_layer=3, hidden=256, n_head=8, n_kv_head=8, ff=512, n_ctx=65536)
    return estimate(facts_of_gguf(target), facts_of_gguf(draft), Settings(backend=request.param, n_ctx=ASKED))


def budget_of(n_bytes: int) -> Budget:
    return Budget((Bound(n_bytes, "asked for"),))


def plan_at(wanted: Estimate, n_bytes: int, **freedom: Any) -> Plan | None:
    try:
        return make_plan(wanted, budget_of(n_bytes), Freedom(**freedom))
    except MemoryBudgetError:
        return None


def budgets(wanted: Estimate) -> range:
    least = required_bytes(wanted.without_draft().at(n_ctx=LEAST_N_CTX, batch=1))
    most = required_bytes(wanted)
    return range(least - MIB, most + 2 * MIB, max(1, (most - least) // 40))


def test_what_fits_is_loaded_as_it_was_asked_for(wanted: Estimate) -> None:
    exact = required_bytes(wanted)
    plan = plan_at(wanted, exact)
    assert plan is not None
    assert (plan.estimate, plan.given_up) == (wanted, ())
    smaller = plan_at(wanted, exact - 1)
    assert smaller is not None
    assert smaller.given_up


@pytest.mark.parametrize("freedom", [{}, {"n_ctx": False}, {"draft": False}, {"n_ctx": False, "draft": False}])
def test_what_is_started_fits_and_what_fits_is_not_refused(wanted: Estimate, freedom: dict[str, Any]) -> None:
    smallest = wanted.at(batch=SHORT_PASS)
    if freedom.get("draft", True):
        smallest = smallest.without_draft()
    if freedom.get("n_ctx", True):
        smallest = smallest.at(n_ctx=LEAST_N_CTX)
    for n_bytes in budgets(wanted):
        plan = plan_at(wanted, n_bytes, **freedom)
        assert (plan is not None) == (required_bytes(smallest) <= n_bytes), n_bytes
        if plan is not None:
            assert required_bytes(plan.estimate) <= n_bytes
            if not freedom.get("n_ctx", True):
                assert plan.estimate.settings.n_ctx == ASKED
            if not freedom.get("draft", True):
                assert plan.estimate.draft is not None


def test_more_memory_never_means_less(wanted: Estimate) -> None:
    plans = [plan for n_bytes in budgets(wanted) if (plan := plan_at(wanted, n_bytes)) is not None]
    drafted = [plan.estimate.draft is not None for plan in plans]
    assert drafted == sorted(drafted), "the draft comes once there is room for it, and stays"
    for kind in (False, True):
        windows = [plan.estimate.settings.n_ctx for plan in plans if (plan.estimate.draft is not None) is kind]
        assert windows == sorted(windows)
        assert len(set(windows)) > 2
    assert all(plan.estimate.settings.n_ctx >= ASKED // 2 for plan in plans if plan.estimate.draft is not None)


def test_every_thing_that_is_given_up_is_said(wanted: Estimate) -> None:
    for n_bytes in budgets(wanted):
        plan = plan_at(wanted, n_bytes)
        if plan is None:
            continue
        said, settings = " ".join(plan.given_up), plan.estimate.settings
        assert ("no draft" in said) == (plan.estimate.draft is None)
        assert (f"a window of {settings.n_ctx} tokens" in said) == (settings.n_ctx != ASKED)
        assert ("at a time" in said) == (settings.batch == SHORT_PASS)


def test_the_error_names_what_is_missing_and_what_would_fit(wanted: Estimate) -> None:
    n_bytes = required_bytes(wanted.at(n_ctx=ASKED // 4, batch=SHORT_PASS))
    with pytest.raises(MemoryBudgetError) as raised:
        make_plan(wanted, budget_of(n_bytes), Freedom(n_ctx=False, draft=False))
    error = raised.value
    assert (error.required_bytes, error.budget_bytes) == (required_bytes(wanted), n_bytes)
    assert error.largest_n_ctx == ASKED // 4
    assert f"--ctx {ASKED // 4}" in str(error)
    fitting = wanted.at(n_ctx=error.largest_n_ctx)
    assert (
        make_plan(fitting, budget_of(n_bytes), Freedom(n_ctx=False, draft=False)).estimate.settings.n_ctx == ASKED // 4
    )
    assert make_plan(wanted, budget_of(required_bytes(wanted.without_draft())), Freedom(n_ctx=False)).given_up == (
        "no draft model",
    )
    with pytest.raises(MemoryBudgetError, match="take a smaller one") as hopeless:
        make_plan(wanted, budget_of(1 * MIB), Freedom())
    assert hopeless.value.largest_n_ctx == 0


def test_a_smaller_cache_type_goes_before_the_window(wanted: Estimate) -> None:
    wanted = wanted.at(backend="llama")
    halved = wanted.at(batch=SHORT_PASS, kv="q8_0")
    plan = make_plan(wanted, budget_of(required_bytes(halved)), Freedom(kv=("q8_0",)))
    assert (plan.estimate.settings.kv, plan.estimate.settings.n_ctx) == ("q8_0", ASKED)
    assert "a cache in q8_0" in plan.given_up


def test_the_room_for_parked_chats_goes_before_anything_else(wanted: Estimate) -> None:
    parking = wanted.at(parked=200 * MIB)
    assert parking.committed_bytes == wanted.committed_bytes + 200 * MIB
    exact = required_bytes(parking)
    assert make_plan(parking, budget_of(exact), Freedom()).estimate == parking
    for n_bytes in (exact - 1, required_bytes(wanted)):
        plan = make_plan(parking, budget_of(n_bytes), Freedom())
        assert plan.given_up == ("no room for parked chats",)
        assert plan.estimate.settings == wanted.settings
    for n_bytes in budgets(wanted):
        with_parked, without = plan_at(parking, n_bytes), plan_at(wanted, n_bytes)
        assert (with_parked is None) == (without is None)
        if with_parked is not None and without is not None and n_bytes < exact:
            assert with_parked.estimate.settings == without.estimate.settings
            assert with_parked.given_up == ("no room for parked chats", *without.given_up)
    with pytest.raises(MemoryBudgetError) as raised:
        make_plan(parking, budget_of(required_bytes(wanted) // 2), Freedom(n_ctx=False, draft=False))
    assert "what fits" in str(raised.value)


@pytest.mark.parametrize("draft_backend", ["onnx", "openvino"])
def test_the_address_space_of_parked_chats_is_counted_once_a_pool(wanted: Estimate, draft_backend: str) -> None:
    both = wanted.at(backend="openvino", draft_backend=draft_backend)
    parking = both.at(parked=200 * MIB)
    pools = [part for part in both.components if part.name == "cache"][: 2 if draft_backend == "openvino" else 1]
    more = parking.committed_bytes + parking.reserved_bytes - both.committed_bytes - both.reserved_bytes
    assert more == sum(200 * MIB + pool.committed_bytes for pool in pools)


def test_each_smaller_draft_is_tried_in_order_before_drafts_are_given_up(wanted: Estimate, tmp_path: Path) -> None:
    shape: dict[str, Any] = {"hidden": 256, "n_head": 8, "n_kv_head": 8, "n_ctx": 65536}
    drafts = [facts_of_gguf(write_tiny_gguf(tmp_path / f"draft-{n}.gguf", n_layer=n, ff=256, **shape)) for n in (2, 1)]
    freedom = Freedom(n_ctx=False, drafts=tuple(drafts))
    choices = [wanted, *(wanted.with_draft(draft) for draft in drafts), wanted.without_draft()]
    for choice in choices:
        plan = make_plan(wanted, budget_of(required_bytes(choice.at(batch=SHORT_PASS))), freedom)
        assert plan.estimate.draft is choice.draft
        name = choice.draft.name if choice.draft else "no draft"
        assert plan.estimate.draft is wanted.draft or any(name in said for said in plan.given_up)


def test_a_drafter_that_needs_a_model_gets_the_smallest_before_nothing(wanted: Estimate, tmp_path: Path) -> None:
    small = facts_of_gguf(write_tiny_gguf(tmp_path / "small.gguf", n_layer=1, ff=256, n_ctx=65536))
    n_bytes = required_bytes(wanted.with_draft(small).at(batch=SHORT_PASS))
    plan = plan_at(wanted, n_bytes, n_ctx=False, draft=False, drafts=(small,))
    assert plan is not None
    assert plan.estimate.draft is small
    assert plan_at(wanted, n_bytes, n_ctx=False, draft=False) is None


def test_what_the_process_holds_for_others_counts(wanted: Estimate) -> None:
    assert foreign_bytes(wanted, 0) == 0
    others = 100 * MIB
    own = sum(part.committed_bytes for part in wanted.components if part.owner == "process" and not part.filled_later)
    exact = budget_of(required_bytes(wanted))
    assert not make_plan(wanted, exact, Freedom(), held_bytes=own + OWN_NOISE_BYTES).given_up
    assert make_plan(wanted, exact, Freedom(), held_bytes=own + OWN_NOISE_BYTES + 1).given_up
    with pytest.raises(MemoryBudgetError):
        make_plan(
            wanted, budget_of(required_bytes(wanted) + others // 2), Freedom(False, False), held_bytes=own + others
        )


def test_a_limit_on_what_is_allocated_counts_what_is_never_touched(wanted: Estimate) -> None:
    roomy = Bound(1 << 40, "asked for")
    needed = required_bytes(wanted, Counts.ALLOCATED)
    assert needed == required_bytes(wanted) + wanted.reserved_bytes
    for counts in (Counts.ALLOCATED, Counts.MAPPED):
        needed = required_bytes(wanted, counts)
        assert not make_plan(wanted, Budget((roomy, Bound(needed, "a limit", counts))), Freedom()).given_up
        assert make_plan(wanted, Budget((roomy, Bound(needed - 1, "a limit", counts))), Freedom()).given_up


# Through the engine


@pytest.fixture
def pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setenv("EDGE_SPEC_HOME", str(tmp_path / "home"))
    # In a process that has run other tests, what those left counts for others.
    monkeypatch.setattr("edge_spec.memory.plan.foreign_bytes", lambda _wanted, _held: 0)
    target = write_tiny_gguf(tmp_path / "target.gguf", n_vocab=512)
    draft = write_tiny_gguf(tmp_path / "draft.gguf", n_vocab=512, seed=1)
    return {"target": target, "draft": draft, "backend": Settings().backend}


def test_an_engine_says_what_it_gave_up(pair: dict[str, Any]) -> None:
    facts = [facts_of_gguf(pair[name]) for name in ("target", "draft")]
    alone = estimate(facts[0], None, Settings(n_ctx=512, threads=1))
    with Engine.load(**pair, ram=required_bytes(alone), threads=1) as engine:
        assert engine.info.draft is None
        assert engine.info.given_up == ("no draft model",)
        assert engine.info.planned_bytes is not None
        assert engine.info.budget_bytes is not None
        assert engine.info.planned_bytes <= engine.info.budget_bytes
        assert "no draft model" in engine.info.notes[0]
        assert "no draft model" in engine.generate("def", max_tokens=3).notes[0]


def test_a_load_says_that_what_a_token_reads_does_not_stay_in_memory(
    pair: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = estimate(facts_of_gguf(pair["target"]), None, Settings(n_ctx=512, threads=1))
    loading: dict[str, Any] = {**pair, "draft": None, "n_ctx": 512, "threads": 1}
    for n_bytes, said in ((alone.working_set_bytes - 1, True), (alone.working_set_bytes, False)):
        assert required_bytes(alone) <= n_bytes
        budget = budget_of(n_bytes)
        monkeypatch.setattr("edge_spec.fitting.find_budget", lambda *_, budget=budget, **__: budget)
        with Engine.load(**loading) as engine:
            assert any("from the disk each time" in note for note in engine.info.notes) == said


def test_an_engine_without_room_for_parked_chats_says_so_and_parks_none(pair: dict[str, Any]) -> None:
    facts = [facts_of_gguf(pair[name]) for name in ("target", "draft")]
    both = estimate(facts[0], facts[1], Settings(n_ctx=512, threads=1))
    room = required_bytes(both) + 8 * MIB
    with Engine.load(**pair, ram=room, parked="1GiB", threads=1) as engine:
        assert engine.info.given_up == ("no room for parked chats",)
        assert "no room for parked chats" in engine.info.notes[0]
        engine.generate("def " * 60, raw=True, max_tokens=2)
        engine.generate("list " * 60, raw=True, max_tokens=2)
        assert engine._target.num_parked == 0
    with Engine.load(**pair, ram=room, parked=4 * MIB, threads=1) as engine:
        assert engine.info.given_up == ()


def test_an_engine_refuses_what_does_not_fit_before_it_exports_anything(pair: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(MemoryBudgetError, match="may hold"):
        Engine.load(**pair, ram="20MiB", threads=1)
    assert not (tmp_path / "home" / "exports").exists()


@pytest.mark.parametrize("drafter", NEED_MODEL)
def test_a_draft_that_was_asked_for_by_its_drafter_is_not_given_up(pair: dict[str, Any], drafter: str) -> None:
    alone = estimate(facts_of_gguf(pair["target"]), None, Settings(n_ctx=512, threads=1))
    with pytest.raises(MemoryBudgetError, match="drafter lookup"):
        Engine.load(**pair, ram=required_bytes(alone), threads=1, n_ctx=512, drafter=drafter)


def test_an_engine_loads_the_smaller_draft_that_fits(pair: dict[str, Any], tmp_path: Path) -> None:
    small = write_tiny_gguf(tmp_path / "small.gguf", n_vocab=512, n_layer=1, ff=256)
    wide = write_tiny_gguf(tmp_path / "wide.gguf", n_vocab=512, n_layer=48, hidden=512, ff=2048, n_head=8)
    target, draft = facts_of_gguf(pair["target"]), facts_of_gguf(small)
    room = required_bytes(estimate(target, draft, Settings(n_ctx=512, threads=1)))
    loading: dict[str, Any] = {"target": pair["target"], "draft": wide, "n_ctx": 512, "threads": 1, "ram": room}
    with Engine.load(**loading, smaller_drafts=[small]) as engine:
        assert engine.info.draft == "small"
        assert engine.info.given_up == ("the draft small instead of wide",)
    with Engine.load(**loading) as engine:
        assert engine.info.draft is None


def test_smaller_drafts_without_a_draft_are_refused(pair: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="smaller_drafts"):
        Engine.load(target=pair["target"], smaller_drafts=[pair["draft"]])


def test_on_llama_the_cache_gets_smaller_before_the_window(pair: dict[str, Any]) -> None:
    pytest.importorskip("llama_cpp")
    target, store_as = facts_of_gguf(pair["target"]), {"backend": "llama", "n_ctx": 512, "threads": 1, "batch": 32}
    smaller = estimate(target, None, Settings(**store_as, kv="q8_0"))  # type: ignore[arg-type]
    loading: dict[str, Any] = {"target": pair["target"], "backend": "llama", "threads": 1, "drafter": "lookup"}
    with Engine.load(**loading, ram=required_bytes(smaller)) as engine:
        assert engine.info.kv == "q8_0"
        assert engine.info.n_ctx == 512
        assert any("q8_0" in given_up for given_up in engine.info.given_up)
