"""The report on pruning is kept row by row, and goes on where it ended."""

from __future__ import annotations

from pathlib import Path

import pytest
from pruning_report.figures import Figures, summary, table
from pruning_report.texts import fact, needle, problem

SETUP = {"pair": None, "sentences": 16}


def test_rows_are_there_for_the_next_run(tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    first = Figures(file, SETUP, None)
    assert first.row("needle", "full 1.0") is None
    first.put("needle", "full 1.0", {"right": 9, "ttft_s": 1.25})
    again = Figures(file, SETUP, None)
    assert again.row("needle", "full 1.0") == {"right": 9, "ttft_s": 1.25}
    assert list(tmp_path.iterdir()) == [file]


def test_figures_of_something_else_are_not_mixed_in(tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    Figures(file, SETUP, None).put("needle", "full 1.0", {"right": 9})
    with pytest.raises(ValueError, match="name another file"):
        Figures(file, {**SETUP, "sentences": 48}, None)


def test_no_row_is_begun_when_time_is_up_and_what_is_left_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("pruning_report.figures.monotonic", lambda: now)
    figures = Figures(None, SETUP, 1.0)
    assert figures.may_begin()
    now = 61.0
    assert not figures.may_begin()
    assert not figures.may_begin()
    assert figures.num_left == 2


def test_the_table_leaves_out_what_is_no_figure(tmp_path: Path) -> None:
    figures = Figures(tmp_path / "report.json", SETUP, None)
    figures.put("chat", "20 turns", {"ratio": 0.38642, "read_tokens": [64, 51]})
    assert table(figures.report).splitlines()[1:] == ["| chat | ratio |", "|---|---|", "| 20 turns | 0.3864 |"]


def test_the_summary_has_each_tasks_median_and_range() -> None:
    rows = {f"rag-{i}": {"ratio": ratio, "shared_words": 0.5} for i, ratio in enumerate((0.9, 0.5, 0.6))}
    (line,) = summary({"sections": {"workload": rows}})
    assert line.startswith("rag, keep 0.5: time to the first token 0.60")
    assert "median of 3 prompts, 0.50 to 0.90" in line


def test_facts_stand_in_their_texts_and_no_two_are_alike() -> None:
    assert len({fact(number)[1].answer for number in range(10)}) == 10
    for depth in range(10):
        text, question = needle(depth, 16)
        assert question.answer in text.removesuffix(question.text)
    assert problem(1, 16)[1].answer == str(13 + 33)
