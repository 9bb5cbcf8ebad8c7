"""What the onnx backend adds to the contract: failures in our terms."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_spec.backends.onnx import OnnxModel
from edge_spec.errors import BackendError
from edge_spec.export import RECIPES, Export, export_model
from tests.tiny_models import write_tiny_gguf


@pytest.fixture
def export(tmp_path: Path) -> Export:
    return export_model(write_tiny_gguf(tmp_path / "tiny.gguf"), RECIPES["int4"], tmp_path / "out", sha256="0" * 64)


def test_a_damaged_graph_is_an_error_of_the_backend_and_prints_nothing(
    export: Export, capfd: pytest.CaptureFixture[str]
) -> None:
    export.model_file.write_bytes(bytes(export.model_file.stat().st_size))
    with pytest.raises(BackendError, match="loading tiny"):
        OnnxModel(export, name="tiny", n_ctx=16, threads=1)
    assert capfd.readouterr() == ("", "")


def test_a_window_that_does_not_fit_the_memory_is_an_error_with_a_remedy(export: Export) -> None:
    with pytest.raises(BackendError, match=r"not enough memory.*--ctx"):
        OnnxModel(export, name="tiny", n_ctx=1 << 50, threads=1)
