"""The benchmark: what is run in which order, what the figures mean, and the command by transcript."""

from __future__ import annotations

import json
import signal
import sys
import types
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_spec.benchmark import (
    Pair,
    Prompt,
    Run,
    choose,
    compare,
    median_interval,
    read_workload,
    sample_workload,
    summarise,
    worst_prompts,
)
from edge_spec.errors import ContextLengthError, UsageError
from edge_spec.types import DrafterStats
from tests.fake_engine import Answer, FakeEngine, FakeInfo, run

# ---- workloads


def workload(folder: Path, *entries: object) -> Path:
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries), "utf-8")
    return path


def test_a_workload_is_read_with_its_turns_and_references(tmp_path: Path) -> None:
    path = workload(
        tmp_path,
        {"id": "a", "task": "code", "prompt": "one\u2028line", "source": "mine"},
        {"id": "b", "task": "chat", "prompt": "hi", "turns": ["hi", "more"], "reference": ["text"]},
    )
    assert read_workload(path) == [
        Prompt("a", "code", ("one\u2028line",)),
        Prompt("b", "chat", ("hi", "more"), ("text",)),
    ]


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ([1], ":2 is not an object"),
        ({"id": "x", "task": "code"}, ":2 needs id, task and prompt"),
        ({"id": "x", "task": "code", "prompt": " "}, ":2 needs id, task and prompt"),
        ({"id": "x", "task": "code", "prompt": "p", "turns": "p"}, ":2: turns must be a list"),
        ({"id": "x", "task": "code", "prompt": "p", "turns": ["q"]}, ":2: turns must begin with the prompt"),
        ({"id": "x", "task": "code", "prompt": "p", "reference": [3]}, ":2: reference must be a list"),
    ],
)
def test_a_line_that_is_no_prompt_is_named(tmp_path: Path, entry: object, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        read_workload(workload(tmp_path, {"id": "a", "task": "t", "prompt": "p"}, entry))


def test_files_that_hold_no_prompts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        read_workload(tmp_path / "missing.jsonl")
    with pytest.raises(UsageError, match="holds no prompts"):
        read_workload(workload(tmp_path))
    path = tmp_path / "prompts.jsonl"
    path.write_text("{", "utf-8")
    with pytest.raises(UsageError, match=":1 is not JSON"):
        read_workload(path)


def test_tasks_and_limits_choose() -> None:
    prompts = [Prompt(f"{task}{i}", task, ("p",)) for i in range(3) for task in ("a", "b")]
    assert [prompt.id for prompt in choose(prompts, limit=1)] == ["a0", "b0"]
    assert [prompt.id for prompt in choose(prompts, tasks=["b"], limit=2)] == ["b0", "b1"]
    with pytest.raises(UsageError, match="the task c: choose among a, b"):
        choose(prompts, tasks=["b", "c"])


def test_the_samples_cover_several_tasks_and_the_ids_are_distinct() -> None:
    prompts = sample_workload()
    assert len({prompt.task for prompt in prompts}) >= 6
    assert len({prompt.id for prompt in prompts}) == len(prompts)
    assert any(len(prompt.turns) == 2 for prompt in prompts)
    assert any(prompt.reference for prompt in prompts)


# ---- runs


def measured(engine: FakeEngine, *prompts: Prompt, **options: Any) -> list[Pair]:
    def refuse(prompt: Prompt, _why: ContextLengthError) -> None:
        raise AssertionError(prompt)

    given: dict[str, Any] = {"max_tokens": 9, "drafter": "auto", "on_skip": refuse, **options}
    return list(compare(engine, prompts, **given))  # type: ignore[arg-type]


def test_prompts_run_both_ways_in_turn_from_empty_caches_and_plain_runs_are_not_padded() -> None:
    engine = FakeEngine(*["ab"] * 6)
    pairs = measured(engine, Prompt("1", "t", ("first",)), Prompt("2", "t", ("second",)))
    warm_up, log = engine.log[:5], engine.log[6:]
    assert [entry.split(":")[0] for entry in warm_up] == ["reset", "unpadded", "none", "padded", "reset"]
    plain = ["reset", "unpadded", "none: first", "padded"]
    assert log[:6] == [*plain, "reset", "auto: first"]
    assert log[6:] == ["reset", "auto: second", "reset", "unpadded", "none: second", "padded"]
    assert [pair.prompt.id for pair in pairs] == ["1", "2"]
    assert {options["max_tokens"] for options in engine.options[2:]} == {9}
    assert {options["sampling"].temperature for options in engine.options} == {0}


def test_several_turns_are_a_chat_and_one_run() -> None:
    engine = FakeEngine("w", "w", *[Answer(["a", "b", "c"])] * 4)
    (pair,) = measured(engine, Prompt("1", "t", ("first", "second")))
    assert [entry for entry in engine.log[6:] if entry[0] != "r"] == [
        "unpadded", "none: first", "none: second", "padded", "auto: first", "auto: second",
    ]  # fmt: skip
    assert len(engine.chats) == 2
    assert pair.plain.answers == [[1, 2, 3], [1, 2, 3]]
    assert pair.plain.decoded_tokens == 4, "the first token of each turn comes with the prompt"
    assert pair.plain.ttft_s == pytest.approx(0.5)
    assert pair.plain.decode_s == pytest.approx(3.5)
    assert pair.speculative.drafters == {"model": DrafterStats(40, 80, 60)}
    assert pair.speculative.own_s == pytest.approx(2 * (0.1 + 0.3 - 0.2))


def test_a_prompt_that_does_not_fit_is_left_out_and_told() -> None:
    too_long = Answer(error=ContextLengthError(5000, 4096))
    engine = FakeEngine("w", "w", too_long, "ab", "ab")
    skipped: list[str] = []
    prompts = Prompt("long", "t", ("p",)), Prompt("short", "t", ("p",))
    pairs = measured(engine, *prompts, on_skip=lambda prompt, _why: skipped.append(prompt.id))
    assert ([pair.prompt.id for pair in pairs], skipped) == (["short"], ["long"])


# ---- figures


def a_run(tokens: int, seconds: float, ttft_s: float = 1.0, **fields: Any) -> Run:
    return Run(decoded_tokens=tokens, decode_s=seconds, ttft_s=ttft_s, **fields)


def test_rates_are_totals_and_ratios_compare_like_with_like() -> None:
    drafted = {"steps": 40, "drafted": 80, "accepted": 60, "own_s": 0.1, "steps_s": 5.0}
    pairs = [
        Pair(Prompt("a1", "a", ("p",)), a_run(100, 10), a_run(100, 5, 1.5, **drafted, answers=[[1]])),
        Pair(Prompt("a2", "a", ("p",)), a_run(20, 2), a_run(20, 4, 1.1, drafters={"model": DrafterStats(1, 2, 3)})),
        # Written in one pass: no rate, so that its plain time must not count either.
        Pair(Prompt("a3", "a", ("p",)), a_run(50, 50), a_run(0, 0.0, 1.2, drafters={"model": DrafterStats(1, 1, 1)})),
        Pair(Prompt("b1", "b", ("p",)), a_run(100, 10), a_run(100, 2.5, 0.5)),
    ]
    report = summarise(pairs, ["a note"])
    first = report.tasks["a"]
    assert (first.prompts, first.plain_tokens_per_s) == (3, 10)
    assert first.speculative_tokens_per_s == pytest.approx(120 / 9)
    assert first.ratio == pytest.approx(120 / 9 / 10)
    assert first.worst_ratio == pytest.approx(0.5)
    assert first.ttft_ratio == pytest.approx(1.2)
    assert (first.tokens_per_step, first.acceptance_rate) == (2.5, 0.75)
    assert first.drafters == {"model": DrafterStats(2, 3, 4)}
    assert report.tasks["b"].acceptance_rate is None
    assert report.geomean_ratio == pytest.approx((120 / 90 * 4) ** 0.5)
    assert report.worst_ratio == pytest.approx(0.5)
    assert report.worst_prompt == "a2"
    assert report.own_share == pytest.approx(0.02)
    assert report.same_answers == 3
    assert report.notes == ["a note"]


def test_nothing_measured_is_no_figure() -> None:
    report = summarise([Pair(Prompt("x", "t", ("p",)), a_run(0, 0.0, 0.0), a_run(0, 0.0, 0.0))])
    assert (report.geomean_ratio, report.worst_prompt, report.own_share) == (None, None, None)
    assert report.tasks["t"].ratio is report.tasks["t"].ttft_ratio is None


# ---- the worst prompts, repeated


def a_pair(name: str, ratio: float | None) -> Pair:
    speculative = a_run(0, 0.0) if ratio is None else a_run(100, 10 / ratio)
    return Pair(Prompt(name, "t", (name,)), a_run(100, 10), speculative)


def test_the_worst_are_those_of_the_smallest_ratios() -> None:
    pairs = [a_pair("slow", 0.8), a_pair("fast", 2), a_pair("short", None), a_pair("even", 1), a_pair("slowest", 0.5)]
    assert [prompt.id for prompt in worst_prompts(pairs, 3)] == ["slowest", "slow", "even"]
    assert [prompt.id for prompt in worst_prompts(pairs, 9)] == ["slowest", "slow", "even", "fast"]


@pytest.mark.parametrize(
    ("n", "interval", "coverage"),
    [
        # Of tables of the sign test: from the k-th smallest to the k-th largest value.
        (1, (1, 1), 0.0),
        (5, (1, 5), 0.9375),
        (6, (1, 6), 0.96875),
        (10, (2, 9), 0.978516),
        (20, (6, 15), 0.958611),
        (50, (18, 33), 0.967161),
    ],
)
def test_an_interval_of_the_median_is_that_of_the_sign_test(n: int, interval: tuple[int, int], coverage: float) -> None:
    values = [float(value) for value in range(n, 0, -1)]
    found, chance = median_interval(values)
    assert found == interval
    assert chance == pytest.approx(coverage, abs=1e-6)


def test_an_interval_holds_the_median_as_often_as_it_says() -> None:
    """Of a skewed distribution; a right interval fails here once in ten thousand tries."""
    rng = np.random.default_rng(5)
    held, tries = 0, 4000
    for _ in range(tries):
        (low, high), coverage = median_interval(rng.exponential(size=10).tolist())
        held += low <= np.log(2) <= high
    assert abs(held / tries - coverage) < 3.9 * (coverage * (1 - coverage) / tries) ** 0.5


def test_repeats_are_told_by_prompt_and_together() -> None:
    repeated = [a_pair(name, ratio) for ratio in (0.9, 1.1, 1.0) for name in ("a", "b")]
    report = summarise([a_pair("a", 0.5), a_pair("b", 0.6)], [], [*repeated, a_pair("c", None)])
    assert report.repeats is not None
    assert list(report.repeats.prompts) == ["a", "b"]
    assert report.repeats.prompts["a"].median_ratio == pytest.approx(1.0)
    assert report.repeats.prompts["a"].interval == pytest.approx((0.9, 1.1))
    assert report.repeats.overall.pairs == 6
    assert report.worst_ratio == pytest.approx(0.5)
    assert summarise([a_pair("a", 1)], [], [a_pair("c", None)]).repeats is None


# ---- the command


def speeds(*seconds: float) -> list[Answer]:
    """Answers of eleven tokens, ten of which take so many seconds."""
    return [Answer(["x"] * 11, changes={"total_s": 0.25 + s}) for s in seconds]


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    path = workload(
        tmp_path,
        {"id": "q-1", "task": "qa", "prompt": "why"},
        {"id": "e-1", "task": "edit", "prompt": "change it"},
    )
    return str(path)


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> FakeEngine:
    # Two to warm up, the first prompt plain first, the second drafted first.
    monkeypatch.setattr("edge_spec.processor.processor_name", lambda: "a processor")
    return FakeEngine("w", "w", *speeds(2, 1, 0.5, 2)).install(monkeypatch)


def test_the_table_tells_each_task_the_mean_and_the_worst(engine: FakeEngine, prompts: str) -> None:
    transcript = run("bench", "--workload", prompts)
    assert transcript.code == 0
    assert [line.rstrip() for line in transcript.out.splitlines()] == [
        "task            prompts  plain t/s  spec. t/s  ratio  worst  tok/step  accepted  ttft s  ttft ratio",
        "qa                    1        5.0       10.0   2.00   2.00      2.50       75%    0.25        1.00",
        "edit                  1        5.0       20.0   4.00   4.00      2.50       75%    0.25        1.00",
        "geometric mean        2                         2.83   2.00",
        "qa: model: 20 steps, 40 drafted, 30 accepted (75%)",
        "edit: model: 20 steps, 40 drafted, 30 accepted (75%)",
        "worst prompt: q-1, 2.00 x",
    ]
    assert transcript.err.splitlines() == [
        "1/2 q-1: 5.0 -> 10.0 tokens/s, 2.00 x",
        "2/2 e-1: 5.0 -> 20.0 tokens/s, 4.00 x",
        "a processor · big + small · onnx · int4 · 2 threads",
        "the same answer both ways: 2 of 2 (plain passes are not padded)",
        "drafters, planner and bookkeeping: 10.0% of decode time",
    ]
    assert engine.closed


def test_drafts_need_not_be_padded_either(engine: FakeEngine, prompts: str) -> None:
    transcript = run("bench", "--workload", prompts, "--no-pad")
    assert transcript.code == 0
    assert engine.loaded_with is not None
    assert engine.loaded_with["pad_rows"] is False


def test_json_is_one_object_with_the_figures(engine: FakeEngine, prompts: str) -> None:
    transcript = run("bench", "--workload", prompts, "--json")
    assert transcript.out.count("\n") == 1
    figures = json.loads(transcript.out)
    assert list(figures)[:7] == ["machine", "target", "draft", "backend", "draft_backend", "recipe", "threads"]
    assert (figures["machine"], figures["target"], figures["threads"]) == ("a processor", "big", 2)
    assert figures["geomean_ratio"] == pytest.approx(8**0.5)
    assert (figures["worst_ratio"], figures["worst_prompt"]) == (2.0, "q-1")
    assert figures["tasks"]["qa"] == {
        "prompts": 1,
        "plain_tokens_per_s": 5.0,
        "speculative_tokens_per_s": 10.0,
        "ratio": 2.0,
        "worst_ratio": 2.0,
        "tokens_per_step": 2.5,
        "acceptance_rate": 0.75,
        "ttft_s": 0.25,
        "ttft_ratio": 1.0,
        "same_answers": 1,
        "drafters": {"model": {"steps": 20, "drafted": 40, "accepted": 30}},
    }


def test_the_worst_prompts_are_repeated_round_by_round(monkeypatch: pytest.MonkeyPatch, prompts: str) -> None:
    # Plain and drafted: 2 x, then drafted and plain: 4 x; then q-1, the worst, plain first, drafted first, plain first.
    answers = speeds(2, 1, 0.5, 2, 2, 2, 2.5, 2, 2, 1.6)
    scripted = FakeEngine("w", "w", *answers).install(monkeypatch)
    transcript = run("bench", "--workload", prompts, "--worst", "1", "--pairs", "3")
    assert transcript.code == 0
    assert [line.rstrip() for line in transcript.out.splitlines()[-3:]] == [
        "worst prompts, repeated  pairs  median ratio  interval of the median",
        "q-1                          3         1.000  0.800 to 1.250 (75.0%)",
        "all of them                  3         1.000  0.800 to 1.250 (75.0%)",
    ]
    assert "worst, 3/3 q-1: 5.0 -> 6.2 tokens/s, 1.25 x" in transcript.err
    kinds = [entry.split(":")[0] for entry in scripted.log if ":" in entry]
    assert kinds[2 + 4 :] == ["none", "auto", "auto", "none", "none", "auto"]


def test_json_has_the_repeats(monkeypatch: pytest.MonkeyPatch, prompts: str) -> None:
    FakeEngine("w", "w", *speeds(2, 1, 0.5, 2), *speeds(*[1] * 40)).install(monkeypatch)
    figures = json.loads(run("bench", "--workload", prompts, "--worst", "2", "--json").out)
    assert list(figures["repeats"]["prompts"]) == ["q-1", "e-1"]
    assert figures["repeats"]["overall"] == {
        "pairs": 20,
        "median_ratio": pytest.approx(1.0),
        "interval": pytest.approx([1.0, 1.0]),
        "coverage": pytest.approx(0.9586, abs=1e-4),
    }
    assert figures["worst_ratio"] == 2.0, "of the run itself"


def test_ctrl_c_among_the_repeats_keeps_those_before(monkeypatch: pytest.MonkeyPatch, prompts: str) -> None:
    interrupted = Answer([lambda: signal.raise_signal(signal.SIGINT)])
    FakeEngine("w", "w", *speeds(2, 1, 0.5, 2, 1, 1), interrupted).install(monkeypatch)
    transcript = run("bench", "--workload", prompts, "--worst", "2", "--json")
    assert transcript.code == 130
    figures = json.loads(transcript.out)
    assert {name: ratio["pairs"] for name, ratio in figures["repeats"]["prompts"].items()} == {"q-1": 1}
    assert figures["notes"] == ["stopped after 1 of 20 pairs of the worst prompts"]


def test_tasks_and_the_samples_are_chosen_by_options(monkeypatch: pytest.MonkeyPatch) -> None:
    scripted = FakeEngine("w", "w", *speeds(1, 1)).install(monkeypatch)
    assert run("bench", "--tasks", "qa", "--limit", "1", "-n", "32", "--drafter", "lookup").code == 0
    assert scripted.turns[2:] == [sample.turns[0] for sample in sample_workload() if sample.id == "qa-1"] * 2
    assert scripted.options[-1]["max_tokens"] == 32
    assert scripted.loaded_with is not None
    assert (scripted.loaded_with["drafter"], scripted.options[-1]["drafter"]) == ("lookup", "lookup")


def test_ctrl_c_keeps_what_was_measured(monkeypatch: pytest.MonkeyPatch, prompts: str) -> None:
    interrupted = Answer([lambda: signal.raise_signal(signal.SIGINT)])
    FakeEngine("w", "w", *speeds(2, 1), interrupted).install(monkeypatch)
    transcript = run("bench", "--workload", prompts)
    assert transcript.code == 130
    assert "worst prompt: q-1, 2.00 x" in transcript.out
    assert "note: stopped after 1 of 2 prompts" in transcript.err


def test_prompts_that_do_not_fit_are_noted(monkeypatch: pytest.MonkeyPatch, prompts: str) -> None:
    too_long = Answer(error=ContextLengthError(5000, 4096))
    FakeEngine("w", "w", too_long, too_long, info=FakeInfo(notes=["of the engine"])).install(monkeypatch)
    transcript = run("bench", "--workload", prompts)
    assert (transcript.code, transcript.out) == (1, "")
    assert "note: of the engine\nnote: q-1 was left out: the prompt has 5000 tokens" in transcript.err


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--drafter", "none"], "is what the others are compared with"),
        (["--pairs", "3"], "it needs --worst"),
        (["--tasks", "cooking"], "choose among code, edit"),
        (["--tasks", "code,"], "names with commas"),
        (["--workload", "nowhere.jsonl"], "cannot be read"),
        (["--plot", "ratios.pdf"], "should end with .png"),
        (["--plot", "no/folder/ratios.png"], "there is no folder"),
    ],
)
def test_bad_usage_is_told_before_anything_loads(engine: FakeEngine, args: list[str], says: str) -> None:
    transcript = run("bench", *args)
    assert transcript.code == 2
    assert says in transcript.err
    assert engine.loaded_with is None


def test_a_plot_without_matplotlib_names_the_install_command_before_anything_loads(
    engine: FakeEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    transcript = run("bench", "--plot", str(tmp_path / "r.png"))
    assert transcript.code == 1
    assert transcript.err == "error: a plot needs matplotlib: pip install 'edge-spec[bench]'\n"
    assert engine.loaded_with is None


def test_a_plot_is_written_where_it_was_asked_for(
    engine: FakeEngine, prompts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a stand-in for matplotlib, which is optional: the bars are the ratios."""
    drawn: dict[str, Any] = {}

    class Drawing:
        def __getattr__(self, name: str) -> Any:
            return lambda *args, **options: drawn.setdefault(name, args)

    class Figure(Drawing):
        def __init__(self, **options: object) -> None:
            pass

        def add_subplot(self) -> Drawing:
            return Drawing()

        def savefig(self, path: Path, **options: object) -> None:
            path.write_bytes(b"picture")

    module = types.ModuleType("matplotlib.figure")
    module.Figure = Figure  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "matplotlib", types.ModuleType("matplotlib"))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", module)
    path = tmp_path / "ratios.png"
    assert run("bench", "--workload", prompts, "--plot", str(path)).code == 0
    assert path.read_bytes() == b"picture"
    assert drawn["bar"] == (["qa", "edit"], [2.0, 4.0])


def test_the_scripted_engine_is_called_as_the_real_one_is(engine: FakeEngine, prompts: str) -> None:
    from edge_spec.conversation import Chat

    run("bench", "--workload", prompts)
    with pytest.MonkeyPatch.context() as patch:
        patch.delitem(sys.modules, "edge_spec.engine")
        from edge_spec.engine import Engine

        signature(Engine.load).bind(**engine.loaded_with or {}, on_progress=None)
        signature(Engine.stream).bind(None, "x", **engine.options[-1])
        signature(Chat.stream).bind(None, "x", **engine.options[-1])
