"""The onnx backend obeys the laws of `CausalLM` on graphs in optimum's layout, padded and not."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import ClassVar

import pytest

from edge_spec.backends.alignment import find_alignment
from edge_spec.backends.past_present import PastPresentModel
from edge_spec.checkpoint import exporter
from edge_spec.checkpoint.exporter import GraphExport, export_graph
from edge_spec.checkpoint.folder import open_checkpoint
from edge_spec.export import RECIPES
from tests.contract import CausalLMContract, EqualRowsContract, MakeModel
from tests.tiny_checkpoint import write_checkpoint, write_optimum_graph


class PastPresentContract(CausalLMContract):
    recipe: ClassVar[str] = "int4"
    aligned: ClassVar[bool] = True

    @pytest.fixture(scope="class")
    @classmethod
    def export(cls, tmp_path_factory: pytest.TempPathFactory) -> GraphExport:
        folder = tmp_path_factory.mktemp("graph")
        graph = write_optimum_graph(folder / "whole.onnx")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(exporter, "run_optimum", lambda _, __, into: shutil.copy(graph, into / "model.onnx"))
            checkpoint = open_checkpoint(write_checkpoint(folder / "checkpoint"))
            recipe = RECIPES[cls.recipe]
            return export_graph(checkpoint, "0" * 64, recipe, folder / "out", lambda: Path("python"), note=print)

    @pytest.fixture(scope="class")
    @classmethod
    def alignment(cls, export: GraphExport) -> int | None:
        if not cls.aligned:
            return None
        model = PastPresentModel(export, name="tiny", n_ctx=64, threads=1)
        found = find_alignment(model)
        model.close()
        assert found is not None, "no padding makes rows independent of the pass on this processor"
        return found

    @pytest.fixture
    def make_model(self, export: GraphExport, alignment: int | None) -> MakeModel:
        def make(n_ctx: int) -> PastPresentModel:
            model = PastPresentModel(export, name="tiny", n_ctx=n_ctx, threads=1)
            model.align_rows(alignment)
            return model

        return make


class TestInt4(PastPresentContract, EqualRowsContract):
    pass


class TestInt8(PastPresentContract, EqualRowsContract):
    recipe = "int8"


class TestInt4Unaligned(PastPresentContract):
    aligned = False
    atol = 0.2  # an odd pass's last row goes through another kernel, which rounds otherwise
