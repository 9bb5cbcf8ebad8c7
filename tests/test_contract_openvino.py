"""The openvino backend obeys the laws of `CausalLM`, for each recipe, padded and not, on tiny models and a real one."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

pytest.importorskip("openvino")

from edge_spec.backends.alignment import find_alignment
from edge_spec.backends.openvino import OpenVinoModel
from edge_spec.errors import UsageError
from edge_spec.export import RECIPES, Export, export_model
from tests.contract import CausalLMContract, EqualRowsContract, MakeModel
from tests.reference_decoder import reference_logits
from tests.tiny_models import write_tiny_gguf


class OpenVinoContract(CausalLMContract):
    recipe: ClassVar[str] = "int4"
    aligned: ClassVar[bool] = True

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
    def alignment(cls, export: Export) -> int | None:
        if not cls.aligned:
            return None
        model = OpenVinoModel(export, name="tiny", n_ctx=64, threads=1)
        found = find_alignment(model)
        model.close()
        assert found is not None, "no padding makes rows independent of the pass on this processor"
        return found

    @pytest.fixture
    def make_model(self, export: Export, alignment: int | None) -> MakeModel:
        def make(n_ctx: int) -> OpenVinoModel:
            model = OpenVinoModel(export, name="tiny", n_ctx=n_ctx, threads=1)
            model.align_rows(alignment)
            return model

        return make


class TestInt4(OpenVinoContract, EqualRowsContract):
    pass


class TestInt4Unaligned(OpenVinoContract):
    aligned = False
    atol = 0.2  # a pass of one row goes through another kernel, which rounds otherwise


class TestInt8(OpenVinoContract, EqualRowsContract):
    recipe = "int8"


class TestExactQ4(OpenVinoContract, EqualRowsContract):
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
class TestSmolLM2(OpenVinoContract, EqualRowsContract):
    @pytest.fixture(scope="class")
    @classmethod
    def source(cls, smollm2_path: Path) -> Path:
        return smollm2_path


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
@pytest.mark.parametrize("tied", [True, False])
def test_logits_are_those_of_the_architecture(architecture: str, tied: bool, tmp_path: Path) -> None:
    """Against a plain NumPy forward pass of the same weights, over more than a block of the cache."""
    path = write_tiny_gguf(tmp_path / "tiny.gguf", architecture=architecture, tied=tied, tensor_type="Q8_0")
    export = export_model(path, RECIPES["exact"], tmp_path / "out", sha256="0" * 64, threads=1)
    model = OpenVinoModel(export, name="tiny", n_ctx=64, threads=1)
    tokens = [int(token) for token in np.random.default_rng(1).integers(0, model.spec.n_vocab, 48)]
    model.decode(tokens[:36], rows=0)
    logits = model.decode(tokens[36:], rows=12).logits
    expected = reference_logits(path, tokens)[36:]
    assert np.corrcoef(logits.ravel(), expected.ravel())[0, 1] > 0.999
    model.close()


def test_a_padding_that_was_never_tried_is_refused(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "tiny.gguf", n_vocab=512)
    export = export_model(path, RECIPES["int4"], tmp_path / "out", sha256="0" * 64, threads=1)
    model = OpenVinoModel(export, name="tiny", n_ctx=64, threads=1)
    with pytest.raises(UsageError, match="1, 2, 4"):
        model.align_rows(3)
    model.close()
