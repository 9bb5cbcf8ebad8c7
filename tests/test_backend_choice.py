"""Which backend `auto` takes: the fastest that was compared here, of what is installed and can do what is asked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edge_spec import backend_choice
from edge_spec.backend_choice import (
    AUTO,
    BackendProfile,
    BackendTimes,
    able_backends,
    choose_backends,
    expected_tokens_per_s,
)
from edge_spec.errors import BackendUnavailableError, UsageError
from edge_spec.export.recipe import RECIPES
from edge_spec.opening import LoadOptions, profile_key, resolve
from edge_spec.store import Store
from tests.fake_engine import run
from tests.tiny_models import write_tiny_gguf

ALL = ("onnx", "openvino", "llama")


def times(one: float, row: float, *, alignment: int | None = None, engine: str = "any 1") -> BackendTimes:
    """A pass takes `one` milliseconds for a row, and `row` for each further one."""
    return BackendTimes(engine, 2, alignment, {n: (one + row * (n - 1)) / 1e3 for n in (*range(1, 17), 32)})


STEEP, FLAT, SLOW = times(20, 10), times(26, 2), times(40, 30)
DRAFT = {"onnx": times(8, 1), "openvino": times(12, 1), "llama": times(16, 9)}


def test_a_flat_target_beats_a_fast_single_row_where_drafts_are_checked() -> None:
    target = {"onnx": STEEP, "openvino": FLAT, "llama": SLOW}
    drafting = choose_backends(ALL, target, DRAFT)
    assert (drafting.backend, drafting.draft_backend, drafting.notes) == ("openvino", "onnx", ())
    assert drafting.tokens_per_s == pytest.approx(expected_tokens_per_s(FLAT, DRAFT["onnx"]))
    assert drafting.threads == 2
    assert choose_backends(ALL, target, None).backend == "onnx"


def test_the_expectation_is_the_planners_with_padding_paid_for() -> None:
    assert expected_tokens_per_s(STEEP, None) == pytest.approx(50)
    padded = times(20, 10, alignment=2)
    assert expected_tokens_per_s(padded, None, plain=True) == pytest.approx(1 / 0.030)
    assert expected_tokens_per_s(padded, None) == pytest.approx(1.2 / 0.030)  # the second row is paid for anyway
    tokens = sum(0.8**n for n in range(8))
    assert expected_tokens_per_s(times(20, 0), times(1, 0)) == pytest.approx(tokens / (0.020 + 7 * 0.001))


def test_a_gain_too_small_to_trust_changes_nothing() -> None:
    assert choose_backends(ALL, {"onnx": times(20, 9), "openvino": times(19.8, 9)}, None).backend == "onnx"
    target = {"onnx": STEEP, "llama": SLOW}
    draft = {"onnx": times(8, 1), "llama": times(7.9, 1)}
    assert choose_backends(ALL, target, draft).draft_backend == "onnx"


def test_copied_drafts_count_unless_nothing_drafts() -> None:
    target = {"onnx": times(30, 1, alignment=2), "llama": times(28, 20)}
    assert choose_backends(ALL, target, None).backend == "onnx"
    assert choose_backends(ALL, target, None, plain=True).backend == "llama"


def test_what_is_not_able_or_not_wanted_is_not_chosen() -> None:
    target = {"onnx": STEEP, "openvino": FLAT, "llama": SLOW}
    assert choose_backends(("onnx", "llama"), target, DRAFT).backend == "onnx"
    kept = choose_backends(ALL, target, DRAFT, draft_backend="llama")
    assert kept.draft_backend == "llama"


def test_without_times_the_first_able_backend_is_taken_at_once_and_said() -> None:
    choice = choose_backends(ALL, {}, DRAFT)
    assert (choice.backend, choice.draft_backend, choice.threads) == ("onnx", "onnx", None)
    assert "nothing was compared" in choice.notes[0]
    assert "doctor --compare" in choice.notes[0]
    assert choose_backends(("llama",), {"onnx": STEEP}, None).backend == "llama"
    assert choose_backends(("openvino",), {}, None).draft_backend == "onnx"


@pytest.mark.parametrize(("features", "taken"), [({"avx2"}, "native"), ({"asimddp"}, "native"), ({"sse2"}, "onnx")])
def test_without_times_native_is_taken_where_its_kernels_know_the_processor(
    monkeypatch: pytest.MonkeyPatch, features: set[str], taken: str
) -> None:
    monkeypatch.setattr(backend_choice, "processor_features", lambda: frozenset(features))
    choice = choose_backends(("onnx", "native", "llama"), {}, DRAFT)
    assert (choice.backend, choice.draft_backend, bool(choice.notes)) == (taken, taken, taken != "native")


def test_times_of_others_say_nothing_of_native(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend_choice, "processor_features", lambda: frozenset({"avx2"}))
    able, target = ("onnx", "native", "llama"), {"onnx": STEEP, "llama": SLOW}
    choice = choose_backends(able, target, DRAFT)
    assert (choice.backend, choice.draft_backend) == ("native", "native")
    assert "native is taken, which was not compared" in choice.notes[0]
    assert choose_backends(able, {**target, "native": SLOW}, DRAFT).backend == "onnx"


def test_a_backend_that_was_not_compared_is_named() -> None:
    choice = choose_backends(ALL, {"onnx": STEEP, "llama": SLOW}, DRAFT)
    assert choice.backend == "onnx"
    assert "openvino not compared yet" in choice.notes[0]


def test_only_what_is_installed_and_can_do_what_is_asked_is_able(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend_choice, "installed_backends", lambda: ("onnx", "llama"))
    assert able_backends(ALL, recipe=None, kv=None) == ("onnx", "llama")
    assert able_backends(ALL, recipe=RECIPES["int8"], kv=None) == ("onnx",)
    assert able_backends(ALL, recipe=None, kv=None, pad_rows=False) == ("onnx",)
    assert able_backends(ALL, recipe=None, kv="q8_0") == ("llama",)
    with pytest.raises(UsageError, match="kv='u8'"):
        able_backends(ALL, recipe=None, kv="u8")


def test_a_profile_holds_for_the_versions_that_were_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {"onnx": "onnxruntime 1", "openvino": "openvino 1"}
    monkeypatch.setattr(backend_choice, "_engine", installed.get)
    profile = BackendProfile(tmp_path)
    assert profile.get("weights") == {}
    onnx, openvino = (times(20, 5, alignment=2, engine=engine) for engine in installed.values())
    profile.put("weights", {"onnx": onnx, "openvino": openvino})
    assert profile.get("weights") == {"onnx": onnx, "openvino": openvino}
    installed["openvino"] = "openvino 2"
    assert profile.get("weights") == {"onnx": onnx}
    assert profile.get("other weights") == {}


@pytest.mark.parametrize("damage", [None, 7, {"onnx": None}, {"onnx": {"seconds": {"1": "x"}}}, {"onnx": {}}])
def test_a_damaged_profile_is_no_profile(tmp_path: Path, damage: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend_choice, "cpu_key", lambda: "cpu")
    (tmp_path / "backends.json").write_text(json.dumps({"cpu | weights": damage}))
    assert BackendProfile(tmp_path).get("weights") == {}


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGE_SPEC_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(backend_choice, "installed_backends", lambda: ALL)
    monkeypatch.setattr(backend_choice, "_engine", lambda _: "any 1")
    write_tiny_gguf(tmp_path / "model.gguf", n_vocab=512)
    return tmp_path / "model.gguf"


def test_a_request_follows_the_profile_and_keeps_what_was_asked_for(model: Path) -> None:
    store = Store()
    fresh = resolve(LoadOptions(target=model, draft=model, backend=AUTO), store)
    assert (fresh.backend, fresh.draft_backend) == ("onnx", "onnx")
    assert "nothing was compared" in fresh.notes[0]
    profile = BackendProfile(store.cache_dir)
    profile.put(profile_key(fresh.source, None), {"onnx": STEEP, "openvino": FLAT, "llama": SLOW})
    profile.put(profile_key(fresh.source, RECIPES["draft"]), DRAFT)

    found = resolve(LoadOptions(target=model, draft=model, backend=AUTO), store)
    assert (found.backend, found.draft_backend, found.notes) == ("openvino", "onnx", ())
    alone = resolve(LoadOptions(target=model, backend=AUTO), store)
    assert alone.backend == "onnx"
    assert resolve(LoadOptions(target=model, draft=model, backend=AUTO, kv="q8"), store).backend == "onnx"
    other = resolve(LoadOptions(target=model, draft=model, backend=AUTO, recipe="int8"), store)
    assert (other.backend, bool(other.notes)) == ("onnx", True)
    assert resolve(LoadOptions(target=model, draft=model, backend="onnx"), store).backend == "onnx"


def test_an_engine_on_auto_loads_at_once_and_says_which(model: Path) -> None:
    from edge_spec import Engine

    with Engine.load(target=model, backend=AUTO, threads=1) as engine:
        assert engine.info.backend == "onnx"
        assert any("nothing was compared" in note for note in engine.info.notes)
        assert engine.generate("a", max_tokens=2).backend == "onnx"


def test_kernels_that_cannot_be_had_are_done_without_and_said(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend_choice, "installed_backends", lambda: ("onnx", "native"))
    monkeypatch.setattr(backend_choice, "has_kernels", lambda: True)

    def fail(*_: object) -> str:
        raise BackendUnavailableError("cc says 'no'")

    monkeypatch.setattr("edge_spec.opening.load_kernels", fail)
    found = resolve(LoadOptions(target=model, draft=model), Store())
    assert (found.backend, found.draft_backend, found.notes[0]) == ("onnx", "onnx", "cc says 'no'")
    asked = resolve(LoadOptions(target=model, draft=model, backend="native"), Store())
    assert (asked.backend, asked.notes) == ("native", ()), "what was asked for fails when it is loaded"
    monkeypatch.setattr("edge_spec.opening.load_kernels", lambda *_: "portable")
    assert resolve(LoadOptions(target=model), Store()).backend == "onnx"


def test_auto_is_a_choice_for_targets_only(model: Path) -> None:
    with pytest.raises(UsageError, match="draft_backend='auto'"):
        resolve(LoadOptions(target=model, draft=model, draft_backend=AUTO), Store())


def test_the_estimate_counts_what_auto_would_take(model: Path) -> None:
    store = Store()
    source = resolve(LoadOptions(target=model), store).source
    BackendProfile(store.cache_dir).put(profile_key(source, None), {"onnx": SLOW, "openvino": FLAT, "llama": STEEP})
    shown = run("estimate", str(model), "--backend", "auto", "--json")
    same = run("estimate", str(model), "--backend", "llama", "--json")
    assert shown.code == same.code == 0, shown.err
    told, expected = json.loads(shown.out), json.loads(same.out)
    assert told["components"] == expected["components"]
