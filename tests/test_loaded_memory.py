"""What a loaded export holds grows with its cache, and bad questions are answered in a line."""

from __future__ import annotations

import sys
from pathlib import Path

import loaded_memory
import pytest

from edge_spec.errors import EdgeSpecError
from edge_spec.export import Recipe, export_model, open_export
from tests.tiny_models import write_tiny_gguf

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="smaps are Linux's")


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("loaded")
    source = write_tiny_gguf(folder / "tiny.gguf")
    return export_model(source, Recipe("int8", 8, 32), folder / "tiny", sha256="0" * 64, threads=1).path


def test_a_longer_cache_is_held_as_well(export: Path) -> None:
    trained = open_export(export).config.n_ctx_train
    short, long = (loaded_memory.hold_apart(export, n_ctx, threads=1) for n_ctx in (1, trained))
    assert short.weights == long.weights > 0
    assert long.cache == trained * short.cache
    assert long.anonymous - short.anonymous >= 0.9 * (long.cache - short.cache)


@pytest.mark.parametrize("n_ctx", [0, 1 << 30])
def test_a_length_that_the_model_was_not_made_for_is_refused(export: Path, n_ctx: int) -> None:
    with pytest.raises(EdgeSpecError, match=f"--ctx {n_ctx}: the model was trained on"):
        loaded_memory.hold_apart(export, n_ctx, threads=1)


@pytest.mark.parametrize(("arguments", "code"), [(["@int4"], 2), (["tiny@"], 2), (["no such model"], 1)])
def test_what_is_no_model_is_said_in_a_line(
    arguments: list[str], code: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("EDGE_SPEC_HOME", str(tmp_path))
    assert loaded_memory.main(arguments) == code
    assert capsys.readouterr().err.count("\n") == 1
