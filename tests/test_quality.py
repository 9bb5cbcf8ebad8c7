from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import quality
from typer.testing import CliRunner

from edge_spec.benchmark.workload import Prompt
from edge_spec.cli import app
from edge_spec.errors import UsageError
from edge_spec.export import RECIPES, export_model
from edge_spec.quality import distributions
from edge_spec.quality.contender import Contender, Name, load
from edge_spec.quality.distributions import compare, expect
from edge_spec.quality.measure import Plan, add_times, measure
from edge_spec.quality.problems import Problem, complete_all, cut, read_problems
from edge_spec.quality.reference import consult, cut_text, fixed_text
from edge_spec.quality.report import as_json, as_text, perplexity
from edge_spec.store import Store
from tests.tiny_models import write_tiny_gguf

PROMPTS = [Prompt("a", "chat", ("the list and the merge",)), Prompt("b", "code", ("def sorted",))]
TEXT = "the list is sorted and the merge of it is in the list " * 8


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    return write_tiny_gguf(tmp_path / "tiny.gguf")


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv("EDGE_SPEC_HOME", str(tmp_path / "home"))
    return Store()


def _softmax(logits: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    weights = np.exp(logits - logits.max(-1, keepdims=True), dtype=np.float64)
    return np.asarray(weights / weights.sum(-1, keepdims=True))


def _logits(contender: Contender, ids: Sequence[int]) -> np.ndarray[Any, Any]:
    return np.concatenate([rows.copy() for _, rows in contender.rows(ids)])


@pytest.mark.parametrize("text", ["tiny", "gpu:tiny", "onnx:", "onnx:tiny@", "onnx/:tiny", ""])
def test_a_contender_that_is_not_backend_model_recipe_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="BACKEND:MODEL"):
        Name.parse(text)


def test_a_contender_reads_as_it_is_written() -> None:
    for text in ("onnx:tiny", "llama:a/b.gguf", "onnx:tiny@int8", "onnx/q8:tiny@int8"):
        assert str(Name.parse(text)) == text
    with pytest.raises(UsageError, match="kv='u8'"):
        Name.parse("onnx/u8:tiny")


def test_a_cache_of_fewer_bits_is_another_contender(gguf: Path, store: Store) -> None:
    identities = set()
    for kv in (None, "q8"):
        with load(Name("onnx", str(gguf), kv=kv), store, threads=1) as contender:
            identities.add(contender.identity)
            assert contender.model.spec.kv_type == (kv or "f32")
    assert len(identities) == 2


def test_folders_of_the_same_name_with_other_weights_are_other_contenders(
    gguf: Path, store: Store, tmp_path: Path
) -> None:
    identities = set()
    for block in (64, 32):
        folder = tmp_path / str(block) / "model"
        folder.parent.mkdir()
        export_model(gguf, replace(RECIPES["int4"], block=block), folder, sha256="0" * 64)
        with load(Name("onnx", str(folder)), store, threads=1) as contender:
            identities.add(contender.identity)
    assert len(identities) == 2


def test_rows_from_the_middle_are_those_of_a_reading_from_the_start(gguf: Path, store: Store) -> None:
    with load(Name("onnx", str(gguf)), store, threads=1) as contender:
        ids = np.random.default_rng(0).integers(0, 250, 300).tolist()
        whole = _logits(contender, ids)
        tail = np.concatenate([rows.copy() for _, rows in contender.rows(ids, 270)])
        assert whole.shape[0] == 300
        np.testing.assert_array_equal(whole[270:], tail)


def test_a_model_does_not_differ_from_itself(gguf: Path, store: Store) -> None:
    with load(Name("onnx", str(gguf)), store, threads=1) as contender:
        passages = cut_text(contender.tokenizer, TEXT)
        compared = compare(contender, passages, expect(contender, passages))
        assert compared.agrees.all()
        assert compared.divergence.max() < 1e-6


def test_divergence_and_perplexity_are_those_of_whole_distributions_where_all_is_kept(
    gguf: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributions, "KEPT", 10_000)
    with load(Name("onnx", str(gguf), "int8"), store, threads=1) as contender:
        passages = cut_text(contender.tokenizer, TEXT)
        ids = passages[0].ids
        expected, p = expect(contender, passages), _softmax(_logits(contender, ids[:-1]))
    with load(Name("onnx", str(gguf), "int4"), store, threads=1) as contender:
        compared, q = compare(contender, passages, expected), _softmax(_logits(contender, ids[:-1]))
    np.testing.assert_allclose(compared.divergence, (p * np.log(p / q)).sum(1), atol=1e-5)
    np.testing.assert_array_equal(compared.agrees, p.argmax(1) == q.argmax(1))
    following = np.array(ids[1:])
    assert perplexity(compared) == pytest.approx(np.exp(-np.log(q[np.arange(len(q)), following]).mean()), rel=1e-5)


def test_divergence_of_what_is_kept_never_exceeds_the_exact_one(
    gguf: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for kept in (4, 32, 10_000):
        monkeypatch.setattr(distributions, "KEPT", kept)
        with load(Name("onnx", str(gguf), "int8"), store, threads=1) as contender:
            passages = cut_text(contender.tokenizer, TEXT)
            expected = expect(contender, passages)
        with load(Name("onnx", str(gguf), "int4"), store, threads=1) as contender:
            found.append(compare(contender, passages, expected).divergence)
    assert (found[0] <= found[1] + 1e-6).all()
    assert (found[1] <= found[2] + 1e-6).all()


def test_the_fixed_text_has_several_thousand_tokens_and_pieces_predict_all_but_their_first(
    gguf: Path, store: Store
) -> None:
    with load(Name("onnx", str(gguf)), store, threads=1) as contender:
        pieces = cut_text(contender.tokenizer, fixed_text())
    assert sum(piece.n_predicted for piece in pieces) > 4000
    assert all(piece.start == 1 for piece in pieces)


def test_what_the_reference_said_is_kept_and_read_again(
    gguf: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    with load(Name("onnx", str(gguf)), store, threads=1) as contender:
        ask: dict[str, Any] = {"answer_tokens": 8, "text": TEXT, "cache_dir": store.cache_dir}
        first = consult(contender, PROMPTS, **ask)
        monkeypatch.setattr("edge_spec.quality.reference.expect", None)
        again = consult(contender, PROMPTS, **ask)
        assert again.answers == first.answers
        np.testing.assert_array_equal(again.on_answers.log_probs, first.on_answers.log_probs)
        with pytest.raises(TypeError):
            consult(contender, PROMPTS, **ask | {"text": "another text"})  # nothing is kept for it
    assert [len(passage.ids) - passage.start <= 8 for passage in first.answers] == [True, True]


def test_an_answer_is_what_the_reference_writes_greedily(gguf: Path, store: Store) -> None:
    with load(Name("onnx", str(gguf)), store, threads=1) as contender:
        said = consult(contender, PROMPTS[:1], answer_tokens=8, text=TEXT, cache_dir=store.cache_dir)
        passage = said.answers[0]
        greedy = _logits(contender, passage.ids[:-1]).argmax(1)
    assert greedy[passage.start - 1 :].tolist() == list(passage.ids[passage.start :])
    assert (said.on_answers.tokens[:, 0] == passage.ids[passage.start :]).all()


def test_a_finer_export_is_closer_to_the_source(gguf: Path, store: Store) -> None:
    names = [Name("onnx", str(gguf), recipe) for recipe in ("int8", "int4")]
    plan = Plan(prompts=PROMPTS, answer_tokens=8, text=TEXT)
    reference, fine, coarse = measure(plan, Name("llama", str(gguf)), names, store)
    assert (reference.perplexity or 0) > 1
    assert fine.divergence is not None
    assert coarse.divergence is not None
    assert 0 <= fine.divergence < coarse.divergence
    table = as_text([reference, fine, coarse])
    assert len(table.splitlines()) == 4
    assert "passed" not in table  # no problems were put
    assert json.loads(json.dumps(as_json([reference, fine], {"x": 1})))["models"][1]["recipe"] == "int8"


def test_a_model_with_a_trimmed_head_is_not_compared(gguf: Path, store: Store, tmp_path: Path) -> None:
    export_model(gguf, replace(RECIPES["draft"], head_rows=64), tmp_path / "draft", sha256="0" * 64)
    plan = Plan(prompts=PROMPTS, answer_tokens=8, text=TEXT)
    with pytest.raises(UsageError, match="trimmed"):
        measure(plan, Name("onnx", str(gguf)), [Name("onnx", str(tmp_path / "draft"))], store)


def test_times_are_those_of_both_models_and_their_ratio(gguf: Path, store: Store) -> None:
    names = [Name("onnx", str(gguf), "int8"), Name("onnx", str(gguf), "int4")]
    rows = measure(Plan(prompts=PROMPTS[:1], answer_tokens=2, text=TEXT), names[0], names[1:], store)
    timed = add_times(rows, names[1], names, store, threads=1)
    assert all(set(row.pass_ms or {}) == {1, 4, 8} for row in timed)
    assert timed[1].pass_ratio == {1: 1.0, 4: 1.0, 8: 1.0}


def test_what_ends_a_function_is_cut_off() -> None:
    assert cut("    return 1\n") is None
    assert cut("    return 1\n```\nThis returns 1.") == "    return 1"
    assert cut("    return 1\n\n\ndef check():\n") == "    return 1\n\n"
    assert cut("    if x:\n        return 1\nif True:") == "    if x:\n        return 1"


def test_programs_are_written_once(gguf: Path, store: Store, tmp_path: Path) -> None:
    problem = Problem("p/0", "def one():\n", "one", "def check(f):\n    assert f() == 1\n")
    kept = tmp_path / "kept.jsonl"
    with load(Name("onnx", str(gguf)), store, threads=1) as contender:
        written = complete_all(contender, [problem], kept)
        kept.write_text(json.dumps({"task_id": "p/0", "completion": "    return 1"}) + '\n{"task_id": "cut sh')
        assert complete_all(contender, [problem], kept) == {"p/0": "    return 1"}
    assert set(written) == {"p/0"}


def test_programs_alone_are_put_without_texts_and_a_draft_changes_none(gguf: Path, store: Store) -> None:
    problem = Problem("p/0", "def one():\n", "one", "def check(f):\n    assert f() == 1\n")
    plan = Plan(prompts=(), problems=[problem], likeness=False)
    name, programs = Name("onnx", str(gguf), "int8"), []
    for drafted in (plan, replace(plan, draft=str(gguf))):
        (row,) = measure(drafted, name, [], store)
        assert (row.problems, row.perplexity, row.positions) == (1, None, 0)
        (kept,) = (store.cache_dir / "quality").iterdir()
        programs.append(kept.read_text())
        kept.unlink()
    assert programs[0] == programs[1]


def test_the_time_to_go_is_told_by_what_is_new(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 0.001, 0.002, 20.0, 50.0])
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    notes = quality._Notes()
    for done in range(5):
        notes("programs", done, 10)
    told = capsys.readouterr().err.splitlines()
    assert told[0] == "programs 0/10"
    assert told[-1] == "programs 4/10, 25.0 s each, 2 min to go"


@pytest.mark.parametrize(
    "line", ["no json", "[1]", '{"task_id": "a", "prompt": "b", "entry_point": "not a name", "test": "c"}', "{}"]
)
def test_a_file_that_holds_something_else_is_no_problems(line: str, tmp_path: Path) -> None:
    path = tmp_path / "problems.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(UsageError, match=r"problems\.jsonl:1"):
        read_problems(path)


def test_problems_that_are_missing_or_not_gzipped_are_refused(tmp_path: Path) -> None:
    (tmp_path / "plain.jsonl.gz").write_text("{}")
    for name in ("none.jsonl", "plain.jsonl.gz"):
        with pytest.raises(UsageError, match="cannot be read"):
            read_problems(tmp_path / name)


def test_programs_alone_need_problems(gguf: Path, store: Store, capsys: Any) -> None:
    assert quality.main(["--reference", f"onnx:{gguf}@int8", "--programs-only"]) == 2
    assert "--programs-only needs --problems" in capsys.readouterr().err


def test_the_tool_prints_one_json_object(gguf: Path, store: Store, tmp_path: Path, capsys: Any) -> None:
    workload = tmp_path / "w.jsonl"
    workload.write_text(json.dumps({"id": "a", "task": "chat", "prompt": "the list"}) + "\n")
    arguments = ["--reference", f"onnx:{gguf}@int8", f"onnx:{gguf}@int4", "--workload", str(workload)]
    assert quality.main([*arguments, "--answer-tokens", "4", "--threads", "1", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert [model["recipe"] for model in printed["models"]] == ["int8", "int4"]
    assert quality.main(["--reference", "nonsense"]) == 2


def test_export_report_compares_with_the_source(gguf: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edge_spec.benchmark.workload.sample_workload", lambda: PROMPTS)
    result = CliRunner().invoke(app, ["export", str(gguf), "--report", "--threads", "1"])
    assert result.exit_code == 0, result.output
    folder = Path(result.stdout.strip())
    figures = json.loads((folder / "quality.json").read_text())
    assert [model["name"].partition(":")[0] for model in figures["models"]] == ["llama", "onnx"]
    assert "agreement" in result.stderr
    assert CliRunner().invoke(app, ["export", str(gguf), "--report", "--draft-of", str(gguf)]).exit_code != 0
