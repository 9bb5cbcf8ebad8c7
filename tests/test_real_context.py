"""Pruned contexts on a small real model: the same text whatever drafts, on every backend."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_spec import Engine

pytestmark = pytest.mark.real

N_CTX = 128
"""Fewer tokens than the questions take, however short the answers are."""
QUESTIONS = (
    "Name three animals that live in the sea.",
    "Which of them is the largest, and how long can it get?",
    "And which of them is the fastest swimmer?",
    "Write one sentence about a fox.",
    "Now one about a crow.",
    "What did I ask you first?",
)


@pytest.fixture(scope="module", params=["native", "onnx", "llama"])
def engine(
    request: pytest.FixtureRequest, smollm2_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Engine]:
    folder = tmp_path_factory.mktemp("home")
    (folder / "draft.gguf").symlink_to(smollm2_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGE_SPEC_HOME", str(folder))
        with Engine.load(
            target=smollm2_path, draft=folder / "draft.gguf", backend=request.param, n_ctx=N_CTX
        ) as loaded:
            yield loaded


@pytest.mark.parametrize("on_full", ["turns", "sinks"])
def test_greedy_text_of_a_pruned_conversation_is_the_same_with_and_without_drafts(engine: Engine, on_full: str) -> None:
    plain, drafted = (engine.chat(system="Be brief.", on_full=on_full) for _ in range(2))
    same = 0
    for question in QUESTIONS:
        expected = plain.send(question, max_tokens=40, drafter="none")
        result = drafted.send(question, max_tokens=40, drafter="model")
        same += result.token_ids == expected.token_ids
        if result.token_ids != expected.token_ids:
            break  # only where a near tie may fall either way
    assert same == len(QUESTIONS) or engine._target.spec.row_alignment is None
    if same == len(QUESTIONS):
        assert expected.dropped[0].policy == result.dropped[0].policy == on_full
        assert result.dropped == expected.dropped


def test_an_answer_goes_on_past_the_window_and_is_still_words(engine: Engine) -> None:
    result = engine.generate("Tell a long story about a lighthouse.", max_tokens=300, on_full="sinks", drafter="none")
    if result.generated_tokens == 300:
        assert result.dropped[0].tokens > 50
    tail = result.text[-200:]
    assert sum(char.isalpha() or char.isspace() for char in tail) > 0.8 * len(tail)
