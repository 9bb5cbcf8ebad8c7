"""The onnx backend obeys the laws of `CausalLM` for every architecture that the exporter builds.

The windows of the tiny models are shorter than the contexts here, so that rolling back and reading again crosses them.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.contract import EqualRowsContract, ShallowContract
from tests.test_contract_onnx import OnnxContract, OnnxModels
from tests.tiny_models import PECULIARITIES, write_tiny_gguf

ALL = sorted(PECULIARITIES)


class TestArchitectures(OnnxContract, EqualRowsContract):
    @pytest.fixture(scope="class", params=sorted(PECULIARITIES.keys() - {"llama", "qwen2"}))
    @classmethod
    def source(cls, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
        path = tmp_path_factory.mktemp("source") / "tiny.gguf"
        return write_tiny_gguf(path, architecture=request.param, n_layer=4, n_vocab=512, tensor_type="F16")


class TestEviction(OnnxModels, ShallowContract):
    @pytest.fixture(scope="class", params=ALL)
    @classmethod
    def source(cls, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
        path = tmp_path_factory.mktemp("source") / "tiny.gguf"
        return write_tiny_gguf(path, architecture=request.param, n_layer=1, n_vocab=512, tensor_type="F16")


class TestEvictionFromAQuantizedCache(TestEviction):
    kv = "q8"
    atol = 0.6  # keys that moved are rounded once more
    alike = 0.99
