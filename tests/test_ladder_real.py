"""Down the ladder on a small real model: memory really goes back to the system."""

from __future__ import annotations

import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
from squeeze import MIB, Seen, is_right, squeeze

from edge_spec import Engine, GenerationResult

pytestmark = [pytest.mark.real, pytest.mark.skipif(sys.platform != "linux", reason="anonymous memory is Linux's")]


def squeezed(target: Path, draft: Path, backend: str) -> tuple[GenerationResult, list[Seen]]:
    with Engine.load(target=target, draft=draft, backend=backend, n_ctx=2048) as engine:
        return squeeze(engine, fill=0.6)


@pytest.mark.parametrize("backend", ["native", "onnx", "llama"])
def test_a_falling_budget_takes_draft_context_and_cache_and_ends_the_answer(
    backend: str, smollm2_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend == "llama":
        pytest.importorskip("llama_cpp")
    monkeypatch.setenv("EDGE_SPEC_HOME", str(tmp_path))
    draft = tmp_path / "draft.gguf"
    draft.symlink_to(smollm2_path)
    # In a process of its own: what other tests left in this one's heap is not what is measured.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        result, seen = pool.submit(squeezed, smollm2_path, draft, backend).result()
    assert is_right(result), result.measures
    # Where memory is short, two measures may be taken between two tokens: what went of the context holds no memory.
    stages = (range(1), range(1, 3), range(3, len(result.measures) + 1))
    held = [min(one.anonymous_bytes for one in seen if one.measures in stage) for stage in stages]
    assert held[1] < held[0] - 20 * MIB, "the draft"
    assert held[2] < held[1] - 8 * MIB, "the cache"
    assert {dropped.policy for dropped in result.dropped} == {"turns"}
