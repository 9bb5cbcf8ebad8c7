"""Down the ladder on a small real model: memory really goes back to the system."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from squeeze import MIB, is_right, squeeze

from edge_spec import Engine

pytestmark = [pytest.mark.real, pytest.mark.skipif(sys.platform != "linux", reason="anonymous memory is Linux's")]


@pytest.mark.parametrize("backend", ["onnx", "llama"])
def test_a_falling_budget_takes_draft_context_and_cache_and_ends_the_answer(
    backend: str, smollm2_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend == "llama":
        pytest.importorskip("llama_cpp")
    monkeypatch.setenv("EDGE_SPEC_HOME", str(tmp_path))
    draft = tmp_path / "draft.gguf"
    draft.symlink_to(smollm2_path)
    with Engine.load(target=smollm2_path, draft=draft, backend=backend, n_ctx=2048) as engine:
        result, seen = squeeze(engine, fill=0.6)
    assert is_right(result), result.measures
    # Where memory is short, two measures may be taken between two tokens: what went of the context holds no memory.
    stages = (range(1), range(1, 3), range(3, len(result.measures) + 1))
    held = [min(one.anonymous_bytes for one in seen if one.measures in stage) for stage in stages]
    assert held[1] < held[0] - 20 * MIB, "the draft"
    assert held[2] < held[1] - 8 * MIB, "the cache"
    assert {dropped.policy for dropped in result.dropped} == {"turns"}
