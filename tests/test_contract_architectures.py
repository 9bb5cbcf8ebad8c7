"""The onnx backend obeys the laws of `CausalLM` for every architecture that the exporter builds.

The windows of the tiny models are shorter than the contexts here, so that rolling back and reading again crosses them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edge_spec.backends.base import CausalLM
from edge_spec.backends.onnx import OnnxModel
from tests.contract import DROPS, EqualRowsContract, ShallowContract, draw
from tests.test_contract_onnx import OnnxContract, OnnxModels
from tests.tiny_models import PECULIARITIES, write_tiny_gguf

ALL = sorted(PECULIARITIES)


class TestArchitectures(OnnxContract, EqualRowsContract):
    @pytest.fixture(scope="class", params=sorted(PECULIARITIES.keys() - {"llama", "qwen2"}))
    @classmethod
    def source(cls, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
        path = tmp_path_factory.mktemp("source") / "tiny.gguf"
        return write_tiny_gguf(path, architecture=request.param, n_layer=4, n_vocab=512, tensor_type="F16")


class ShallowModels(OnnxModels):
    @pytest.fixture(scope="class", params=ALL)
    @classmethod
    def source(cls, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
        path = tmp_path_factory.mktemp("source") / "tiny.gguf"
        return write_tiny_gguf(path, architecture=request.param, n_layer=1, n_vocab=512, tensor_type="F16")


class TestEviction(ShallowModels, ShallowContract):
    @pytest.mark.parametrize("drops", DROPS)
    def test_what_was_evicted_might_never_have_been_read(self, model: CausalLM, drops: list[tuple[int, int]]) -> None:
        """Seen in the cache itself: in logits a last bit may tip an activation that is rounded to 8 bits, and then they
        differ by as much as that, here or on the next processor."""
        tokens, more = draw(model, 40), draw(model, 4, seed=1)
        left = list(tokens)
        model.decode(tokens)
        for start, end in drops:
            model.evict(start, end)
            del left[start:end]
        cached = cache_of(model)
        logits = model.decode(more, rows=4).logits.copy()
        model.rollback(0)
        model.decode(left)
        for name, array in cache_of(model).items():
            np.testing.assert_allclose(cached[name], array, rtol=0, atol=1e-5 * np.abs(array).max(), err_msg=name)
        expected = model.decode(more, rows=4).logits
        assert np.corrcoef(logits.ravel(), expected.ravel())[0, 1] > self.alike


def cache_of(model: CausalLM) -> dict[str, NDArray[Any]]:
    """Keys and values of what is cached, by name; copies."""
    assert isinstance(model, OnnxModel)
    return {name: array[:, :, : model.length].copy() for name, array in model._cache.arrays()}


class TestEvictionFromAQuantizedCache(ShallowModels, ShallowContract):
    kv = "q8"
    atol = 0.6  # keys that moved are rounded once more
    alike = 0.99
