"""The curve of a draft: guesses are the model's own, and a replay rewards what it should."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import draft_curve
import numpy as np
import pytest
from draft_bench.answers import Answer, read
from draft_bench.measure import guess
from draft_bench.replay import Passes, geometric_mean, replay

from edge_spec.backends.onnx import OnnxModel
from edge_spec.errors import UsageError
from edge_spec.export import Recipe, export_model, open_export
from tests.tiny_models import write_tiny_gguf

N_VOCAB = 640


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two exports of one tiny model, the second with a trimmed head."""
    folder = tmp_path_factory.mktemp("exports")
    source = write_tiny_gguf(folder / "tiny.gguf", n_vocab=N_VOCAB)
    for name, head_rows in (("straight", 0), ("trimmed", 300)):
        export_model(source, Recipe(name, 8, 32, head_rows=head_rows), folder / name, sha256="0" * 64, threads=1)
    return folder


@pytest.fixture(scope="module")
def answers() -> list[Answer]:
    rng = np.random.default_rng(0)
    return [Answer(task, rng.integers(0, 600, 20).tolist(), rng.integers(0, 600, 40).tolist()) for task in "ab"]


def test_guesses_are_the_models_own_at_each_position(exports: Path, answers: list[Answer]) -> None:
    model = OnnxModel(open_export(exports / "straight"), name="tiny", n_ctx=128, threads=1)
    answer = answers[0]
    guesses = guess(model, answer)
    model.rollback(0)
    sequence, expected = answer.prompt + answer.ids, []
    for position in range(len(sequence) - 1):
        row = model.decode(sequence[position : position + 1]).logits[0].astype(np.float64)
        expected.append((int(row.argmax()), 1 / np.exp(row - row.max()).sum()))
    model.close()
    assert len(guesses) == len(answer.ids)
    for (_, probability), (_, other) in zip(guesses, expected[len(answer.prompt) - 1 :], strict=True):
        assert probability == pytest.approx(other, rel=0.1)


def test_a_right_and_cheap_draft_is_worth_more_than_a_dear_or_a_wrong_one(answers: list[Answer]) -> None:
    right = [[(token, 0.99) for token in answer.ids] for answer in answers]
    wrong = [[((token + 1) % 600, 0.1) for token in answer.ids] for answer in answers]
    cheap, dear, useless = (
        geometric_mean(replay(answers, guesses, Passes.of_draft(draft_ms)))
        for guesses, draft_ms in ((right, 2.0), (right, 20.0), (wrong, 2.0))
    )
    assert cheap > dear > 1
    assert cheap > 1.5
    assert 0.5 < useless < 1.05


def test_drafts_are_worth_less_the_more_a_row_costs(answers: list[Answer]) -> None:
    right = [[(token, 0.99) for token in answer.ids] for answer in answers]
    worths = [
        geometric_mean(replay(answers, right, Passes.of_row_cost(2, cost), Passes.of_row_cost(30, cost)))
        for cost in (0.01, 0.1, 0.4, 1.0)
    ]
    assert worths == sorted(worths, reverse=True)
    assert worths[1] > 1.5
    assert worths[-1] == pytest.approx(1, abs=0.05)


def test_the_curve_has_a_line_for_each_point(
    exports: Path, answers: list[Answer], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "answers.jsonl"
    lines = [json.dumps({"task": a.task, "prompt": a.prompt, "ids": a.ids}) + "\n" for a in answers]
    file.write_text("".join(lines), "utf-8")
    assert read(file) == answers
    options = ["--answers", str(file), "--exports", str(exports), "--threads", "1", "--rounds", "2"]
    for _ in range(2):  # the second time with the guesses that were kept
        assert draft_curve.main([*options, "--points", "straight,trimmed"]) == 0
        _, _, *rows = capsys.readouterr().out.splitlines()
        assert [row.split(" | ")[0] for row in rows] == ["| straight", "| trimmed"]
        assert rows[0].split(" | ")[2] == "1.000"
    assert draft_curve.main([*options, "--points", "straight", "--row-costs", "0.1,0.4"]) == 0
    header, _, row = capsys.readouterr().out.splitlines()
    assert "| times plain decoding, 0.1 a row | times plain decoding, 0.4 a row |" in header
    assert row.count("|") == header.count("|")
    for nonsense in ("0", "-1", "nan", "much", "0.1,"):
        with pytest.raises(SystemExit, match="2"):
            draft_curve.main([*options, "--points", "straight", "--row-costs", nonsense])
    capsys.readouterr()
    assert draft_curve.main([*options, "--points", "straight,nonsense"]) == 2
    assert "nonsense is no export" in capsys.readouterr().err


def test_a_file_without_answers_is_refused(tmp_path: Path) -> None:
    (tmp_path / "answers.jsonl").write_text('{"task": 1}\n', "utf-8")
    with pytest.raises(UsageError, match="recorded answers"):
        read(tmp_path / "answers.jsonl")


def test_an_export_by_another_recipe_than_its_name_says_is_refused(
    exports: Path, answers: list[Answer], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "answers.jsonl"
    file.write_text("".join(json.dumps(asdict(answer)) + "\n" for answer in answers), "utf-8")
    (tmp_path / "draft").symlink_to(exports / "trimmed")
    arguments = ["--answers", str(file), "--exports", str(tmp_path), "--points", "draft"]
    assert draft_curve.main(arguments) == 2
    assert "another recipe" in capsys.readouterr().err
