"""The onnx backend obeys the laws of `CausalLM`, for each recipe, padded and not, on tiny models and a real one."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from edge_spec.backends.alignment import find_alignment
from edge_spec.backends.kv_scales import KvScales, measure_scales
from edge_spec.backends.onnx import OnnxModel
from edge_spec.export import RECIPES, Export, export_model
from tests.contract import CausalLMContract, EqualRowsContract, MakeModel
from tests.tiny_models import write_tiny_gguf


class OnnxModels:
    """How the laws of a suite get their model."""

    recipe: ClassVar[str] = "int4"
    aligned: ClassVar[bool] = True
    kv: ClassVar[str] = "f32"

    @pytest.fixture(scope="class")
    @classmethod
    def source(cls, tmp_path_factory: pytest.TempPathFactory) -> Path:
        """The GGUF to export."""
        return write_tiny_gguf(tmp_path_factory.mktemp("source") / "tiny.gguf", n_vocab=512)

    @pytest.fixture(scope="class")
    @classmethod
    def export(cls, source: Path, tmp_path_factory: pytest.TempPathFactory) -> Export:
        path = tmp_path_factory.mktemp("export") / "model"
        return export_model(source, RECIPES[cls.recipe], path, sha256="0" * 64, threads=1)

    @pytest.fixture(scope="class")
    @classmethod
    def kv_scales(cls, export: Export) -> KvScales | None:
        if cls.kv == "f32":
            return None
        model = OnnxModel(export, name="tiny", n_ctx=128, threads=1)
        tokens = np.random.default_rng(7).integers(0, model.spec.n_vocab, 128)
        scales = measure_scales(model, [int(token) for token in tokens])
        model.close()
        return scales

    @pytest.fixture(scope="class")
    @classmethod
    def alignment(cls, export: Export, kv_scales: KvScales | None) -> int | None:
        if not cls.aligned:
            return None
        model = OnnxModel(export, name="tiny", n_ctx=64, threads=1, kv_scales=kv_scales)
        found = find_alignment(model)
        model.close()
        assert found is not None, "no padding makes rows independent of the pass on this processor"
        return found

    @pytest.fixture
    def make_model(self, export: Export, alignment: int | None, kv_scales: KvScales | None) -> MakeModel:
        def make(n_ctx: int) -> OnnxModel:
            model = OnnxModel(export, name="tiny", n_ctx=n_ctx, threads=1, kv_scales=kv_scales)
            model.align_rows(alignment)
            return model

        return make


class OnnxContract(OnnxModels, CausalLMContract):
    pass


class TestInt4(OnnxContract, EqualRowsContract):
    pass


class TestInt4Unaligned(OnnxContract):
    aligned = False
    atol = 0.2  # an odd pass's last row goes through another kernel, which rounds otherwise


class TestQuantizedCache(OnnxContract, EqualRowsContract):
    kv = "q8"


class TestInt8(OnnxContract, EqualRowsContract):
    recipe = "int8"


class TestExactQ4(OnnxContract, EqualRowsContract):
    recipe = "exact"

    @pytest.fixture(scope="class")
    @classmethod
    def source(cls, tmp_path_factory: pytest.TempPathFactory) -> Path:
        return write_tiny_gguf(
            tmp_path_factory.mktemp("source") / "tiny.gguf",
            architecture="qwen2",
            tensor_type="Q4_0",
            tensor_types={"attn_v": "Q8_0", "ffn_down": "Q6_K"},
            tied=False,
        )


@pytest.mark.real
class TestSmolLM2(OnnxContract, EqualRowsContract):
    @pytest.fixture(scope="class")
    @classmethod
    def source(cls, smollm2_path: Path) -> Path:
        return smollm2_path
