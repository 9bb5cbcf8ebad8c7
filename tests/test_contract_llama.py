"""The llama backend obeys the laws of `CausalLM`, on tiny models of two architectures and on a real one."""

from __future__ import annotations

import atexit
from pathlib import Path

import pytest

from edge_spec.backends import llama
from edge_spec.backends._llama_library import import_library
from tests.contract import CausalLMContract, MakeModel
from tests.tiny_models import write_tiny_gguf

llama_cpp = import_library()  # without the llama extra, its error names the command that installs it
# The library opens these when it is imported and never closes them: noise at the end of a run with strict warnings.
atexit.register(llama_cpp._utils.outnull_file.close)
atexit.register(llama_cpp._utils.errnull_file.close)


@pytest.fixture(scope="module")
def llama_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_gguf(tmp_path_factory.mktemp("tiny") / "llama.gguf")


@pytest.fixture(scope="module")
def qwen2_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny") / "qwen2.gguf"
    return write_tiny_gguf(path, architecture="qwen2", tied=False, tensor_type="F16")


class LlamaContract(CausalLMContract):
    atol = 0.02  # a last bit tips the rounding of a key or value in the f16 cache


class TestTinyLlama(LlamaContract):
    @pytest.fixture
    def make_model(self, llama_path: Path) -> MakeModel:
        return lambda n_ctx: llama.load(llama_path, name="tiny", n_ctx=n_ctx, threads=1)


class TestTinyQwen2(LlamaContract):
    @pytest.fixture
    def make_model(self, qwen2_path: Path) -> MakeModel:
        return lambda n_ctx: llama.load(qwen2_path, name="tiny", n_ctx=n_ctx, threads=1)


class TestTinyInManyPasses(LlamaContract):
    """Long inputs, split so that the last pass holds every row that is asked for."""

    @pytest.fixture
    def make_model(self, llama_path: Path) -> MakeModel:
        return lambda n_ctx: llama.load(llama_path, name="tiny", n_ctx=n_ctx, threads=1, max_rows=6, n_batch=8)


@pytest.mark.real
class TestSmolLM2(LlamaContract):
    @pytest.fixture
    def make_model(self, smollm2_path: Path) -> MakeModel:
        return lambda n_ctx: llama.load(smollm2_path, name="smollm2-135m", n_ctx=n_ctx, threads=1)
