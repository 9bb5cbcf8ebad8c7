"""The governor's laws: what it gives back, in which order, and when it leaves things alone."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import pytest

from edge_spec.decoding import SpeculativeDecoder
from edge_spec.decoding.session import Session
from edge_spec.drafting import Costs, LookupDrafter, ModelDrafter, Planner
from edge_spec.errors import BackendMemoryError
from edge_spec.ladder import Ladder
from edge_spec.memory.governor import MACHINE_EVERY_S, OWN_EVERY_S, SETTLE_S, Governor
from edge_spec.memory.pressure import Level, MacPressure, Marks, OwnMemory, Reading
from edge_spec.memory.process import Usage, process_memory, release_free_memory
from edge_spec.types import Decoded, FinishReason, Output
from tests.fakes import FakeLM

MIB = 1 << 20
PROMPT = [1, 2, 3]


@dataclass
class Gauge:
    """A signal that is set by hand, and counts how often it is read."""

    level: Level = Level.CALM
    reads: int = 0

    def read(self) -> Reading:
        self.reads += 1
        return Reading(self.level, "the gauge says so" if self.level else "")


@dataclass
class Scene:
    """A governor with a clock that is set by hand and rungs that are used up."""

    own: Gauge = field(default_factory=Gauge)
    machine: Gauge = field(default_factory=Gauge)
    left: list[str] = field(default_factory=lambda: ["first", "second"])
    now: float = 0.0

    def __post_init__(self) -> None:
        rungs = [self._rung("first"), self._rung("second")]
        self.governor = Governor(self.own, [self.machine], rungs, clock=lambda: self.now)

    def _rung(self, name: str) -> Callable[[], str | None]:
        def rung() -> str | None:
            if name not in self.left:
                return None
            self.left.remove(name)
            return name

        return rung

    def later(self, seconds: float) -> bool:
        """Whether the governor wants to step in by then."""
        self.now += seconds
        return self.governor.is_due()


# When to act


def test_nothing_is_done_while_memory_is_calm_or_only_getting_short() -> None:
    scene = Scene()
    for level in (Level.CALM, Level.EASING):
        scene.own.level = scene.machine.level = level
        assert not any(scene.later(2.0) for _ in range(5))
    assert scene.governor.notes == []


def test_rungs_go_in_order_until_memory_is_calm_again() -> None:
    scene = Scene()
    scene.own.level = Level.HIGH
    assert scene.later(1.0)
    assert scene.governor.step_in() is None
    assert scene.left == ["second"]
    scene.own.level = Level.EASING  # below the mark that started it, above the one that ends it
    assert scene.later(1.0)
    assert scene.governor.step_in() is None
    assert scene.left == []
    assert scene.governor.notes == [f"memory: {name}, because the gauge says so" for name in ("first", "second")]


def test_a_level_that_swings_about_the_upper_mark_costs_one_rung_only() -> None:
    scene = Scene()
    scene.own.level = Level.HIGH
    assert scene.later(1.0)
    scene.governor.step_in()
    for level in (Level.CALM, Level.EASING, Level.CALM, Level.EASING):
        scene.own.level = level
        assert not scene.later(1.0)
    assert scene.left == ["second"]


def test_the_generation_stops_when_nothing_is_left_and_memory_is_still_short() -> None:
    scene = Scene(left=[])
    scene.own.level = Level.HIGH
    assert scene.later(1.0)
    assert scene.governor.step_in() is FinishReason.MEMORY
    assert scene.governor.notes == ["memory: stopped, because the gauge says so and there is nothing left to give back"]
    scene.governor.begin()
    assert scene.governor.notes == [], "a stop is of one generation"


def test_with_nothing_left_a_middling_level_neither_stops_nor_interrupts_again() -> None:
    scene = Scene(left=["first"])
    scene.own.level = Level.HIGH
    assert scene.later(1.0)
    assert scene.governor.step_in() is None
    scene.own.level = Level.EASING
    assert scene.later(1.0)
    assert scene.governor.step_in() is None
    assert not any(scene.later(1.0) for _ in range(5))


def test_what_was_done_stays_noted_for_later_generations() -> None:
    scene = Scene()
    scene.own.level = Level.HIGH
    scene.later(1.0)
    scene.governor.step_in()
    scene.governor.begin()
    assert scene.governor.notes == ["memory: first, because the gauge says so"]


def test_after_a_measure_the_machine_gets_time_to_show_it() -> None:
    scene = Scene()
    scene.machine.level = Level.HIGH
    assert scene.later(1.0)
    scene.governor.step_in()
    assert not scene.later(SETTLE_S / 2)
    assert scene.later(SETTLE_S)
    assert scene.left == ["second"]


def test_looking_is_rare_whatever_the_number_of_steps() -> None:
    scene = Scene()
    for _ in range(1000):
        scene.later(0.001)
    assert scene.own.reads <= 1 / OWN_EVERY_S + 1
    assert scene.machine.reads <= 1 / MACHINE_EVERY_S + 1


def test_a_failure_climbs_a_rung_whatever_the_signals_say_and_stops_without_one() -> None:
    scene = Scene(left=["second"])
    assert scene.governor.step_in(BackendMemoryError("no more")) is None
    assert scene.governor.step_in(MemoryError()) is FinishReason.MEMORY
    assert "the backend got no more memory" in scene.governor.notes[-1]


# What the signals say


class Held:
    """A process that holds what it is told to."""

    def __init__(self, n_bytes: int = 0) -> None:
        self.n_bytes = n_bytes

    def read(self) -> Usage:
        return Usage(self.n_bytes, self.n_bytes)


@pytest.mark.parametrize(
    ("held_mib", "level"), [(900, Level.CALM), (970, Level.EASING), (990, Level.HIGH), (1100, Level.HIGH)]
)
def test_own_memory_is_short_before_the_budget_is_reached(held_mib: int, level: Level) -> None:
    assert OwnMemory(1000 * MIB, Held(held_mib * MIB)).read().level is level


def test_marks_are_ordered() -> None:
    marks = Marks(10, 20)
    assert [marks.level(left) for left in (-1, 9, 10, 19, 20)] == [
        Level.HIGH,
        Level.HIGH,
        Level.EASING,
        Level.EASING,
        Level.CALM,
    ]


@pytest.mark.parametrize(("said", "level"), [(1, Level.CALM), (2, Level.EASING), (4, Level.HIGH)])
def test_macos_levels(said: int, level: Level) -> None:
    assert MacPressure(lambda: said).read().level is level


def test_what_this_process_takes_shows_in_its_reading() -> None:
    gc.collect()
    release_free_memory()  # what earlier tests left may not serve the block
    memory = process_memory()
    before = memory.read()
    block = np.ones(64 * MIB, np.uint8)
    after = memory.read()
    assert after.anonymous_bytes - before.anonymous_bytes >= 60 * MIB
    assert after.resident_bytes >= after.anonymous_bytes > 0
    del block


# The rungs of an engine


def plain(prompt: list[int], count: int) -> list[int]:
    """What the fake target writes alone."""
    steps = SpeculativeDecoder(Session(FakeLM(n_ctx=512))).generate(prompt, max_tokens=count)
    return [token for step in steps for token in step.tokens]


class Tiring(FakeLM):
    """Fails for want of memory in the passes whose numbers it is given."""

    def __init__(self, *args: int, failing: set[int], **options: int) -> None:
        super().__init__(*args, **options)  # type: ignore[arg-type]
        self._failing = failing
        self._passes = 0

    def decode(self, tokens: object, *, rows: int = 1, want: Output = Output.LOGITS) -> Decoded:
        self._passes += 1
        if self._passes in self._failing:
            self.tokens = [0] * 5  # whatever: the cache counts as unknown
            raise BackendMemoryError("the fake library got no memory")
        return super().decode(tokens, rows=rows, want=want)  # type: ignore[arg-type]


def write(model: FakeLM, draft: FakeLM | None, governor: Governor | None = None, **options: object) -> list[int]:
    drafter = ModelDrafter(Session(draft)) if draft else None
    target = Session(model)
    supervisor = governor or Governor(Gauge(), [], Ladder(target, drafter, Held()).rungs)
    decoder = SpeculativeDecoder(target, drafter)
    steps = list(decoder.generate(PROMPT, max_tokens=40, supervisor=supervisor, **options))  # type: ignore[arg-type]
    return [token for step in steps for token in step.tokens]


@pytest.mark.parametrize("at", [1, 2, 5])
def test_a_failure_in_the_middle_leaves_the_text_as_it_would_have_been(at: int) -> None:
    whole = plain(PROMPT, 40)
    draft = Tiring(failing={at}, seed=1)
    assert write(FakeLM(), draft) == whole
    assert draft.closed, "the draft goes first"
    target = Tiring(failing={at})
    draft = Tiring(failing=set(), seed=1)
    assert write(target, draft) == whole


def test_without_a_rung_a_failure_ends_the_text_where_it_is() -> None:
    model = Tiring(failing={6})
    model.spec = replace(model.spec, can_resize=False)
    session = Session(model)
    governor = Governor(Gauge(), [], Ladder(session, None, Held()).rungs)
    steps = list(SpeculativeDecoder(session).generate(PROMPT, max_tokens=40, supervisor=governor))
    assert steps[-1].finish_reason is FinishReason.MEMORY
    written = [token for step in steps for token in step.tokens]
    assert written == plain(PROMPT, 40)[: len(written)]
    assert 0 < len(written) < 40


def test_without_a_supervisor_a_failure_is_the_callers() -> None:
    with pytest.raises(BackendMemoryError):
        list(SpeculativeDecoder(Session(Tiring(failing={3}))).generate(PROMPT, max_tokens=40))


def test_the_planner_goes_on_without_a_model_that_was_unloaded() -> None:
    model = ModelDrafter(Session(FakeLM(seed=1, name="draft")))

    def costs() -> Costs:
        return Costs(max_rows=8, alignment=1, draft_share=0.1)

    planner = Planner(costs(), LookupDrafter(max_draft=7, bold=True), model, fixed=costs())
    decoder = SpeculativeDecoder(Session(FakeLM()), planner)
    written: list[int] = []
    for number, step in enumerate(decoder.generate(PROMPT, max_tokens=40)):
        written += step.tokens
        if number == 3:
            model.unload()
    assert written == plain(PROMPT, 40)
    assert model.propose([*PROMPT, *written], 4).tokens == []


def test_the_window_is_cut_to_the_text_and_some_room() -> None:
    session = Session(FakeLM(n_ctx=2048))
    ladder = Ladder(session, None, Held())
    session.decode([1, 2, 3])
    assert ladder.fit_window() == "the window was cut from 2048 to 320 tokens (0B given back)"
    assert session.spec.n_ctx == 320
    assert session.count_unread([1, 2, 3, 4]) == 1, "what was read stays"
    assert ladder.fit_window() is None, "there is nothing more to be had"


def test_a_halved_window_forgets_what_does_not_fit() -> None:
    session = Session(FakeLM(n_ctx=2048))
    session.decode(list(range(16)) * 64)
    assert Ladder(session, None, Held()).halve_window() is not None
    assert session.spec.n_ctx == 1024
    session.resize(600)
    assert session.count_unread(list(range(16)) * 64) == 1024 - 600


def test_a_prompt_is_read_on_where_the_governor_interrupted_it() -> None:
    scene = Scene()
    model, read = FakeLM(n_ctx=512), []
    prompt = [1, 2, 3, 4] * 64

    def progress(done: int, total: int) -> None:
        read.append((done, total))
        scene.now += 1.0
        scene.own.level = Level.HIGH if len(read) == 1 else Level.CALM

    decoder = SpeculativeDecoder(Session(model))
    steps = list(decoder.generate(prompt, max_tokens=3, on_progress=progress, supervisor=scene.governor))
    assert [token for step in steps for token in step.tokens] == plain(prompt, 3)
    assert scene.left == ["second"]
    assert model.num_decoded <= len(prompt) + 3, "nothing was read twice"


def test_the_callers_cancel_wins_over_the_governor() -> None:
    scene = Scene()
    scene.own.level = Level.HIGH
    scene.now = 1.0
    decoder = SpeculativeDecoder(Session(FakeLM()))
    steps = list(decoder.generate(PROMPT, cancelled=lambda: True, supervisor=scene.governor))
    assert [step.finish_reason for step in steps] == [FinishReason.CANCELLED]
    assert scene.left == ["first", "second"]
