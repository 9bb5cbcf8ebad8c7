"""The llama backend obeys the laws of `CausalLM`, on tiny models of two architectures and on a real one."""

from __future__ import annotations

import atexit
from pathlib import Path

import pytest

from edge_spec.backends import llama
from edge_spec.backends._llama_library import import_library
from tests.contract import CausalLMContract, MakeModel, ShallowContract
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


class TestEviction(ShallowContract):
    atol = 0.05  # keys are stored in half precision, and turned there

    @pytest.fixture(params=["llama", "llama-linear", "phi3", "qwen2", "qwen3", "smollm3"])
    def make_model(self, request: pytest.FixtureRequest, tmp_path: Path) -> MakeModel:
        architecture, _, rope = request.param.partition("-")
        metadata = {"llama.rope.scaling.type": rope, "llama.rope.scaling.factor": 4.0} if rope else {}
        metadata |= {"phi3.rope.scaling.attn_factor": 1.0} if architecture == "phi3" else {}
        path = tmp_path / "tiny.gguf"
        write_tiny_gguf(path, architecture=architecture, n_layer=1, n_vocab=512, metadata=metadata)
        return lambda n_ctx: llama.load(path, name="tiny", n_ctx=n_ctx, threads=1)


class TestTinyGemma3(LlamaContract):
    """Two caches, one of the windowed layers: it cannot evict, and saves only what is in its window of 8 tokens."""

    resize_keeps = 0

    @pytest.fixture
    def make_model(self, tmp_path: Path) -> MakeModel:
        path = write_tiny_gguf(tmp_path / "tiny.gguf", architecture="gemma3", n_layer=4, n_vocab=512)
        return lambda n_ctx: llama.load(path, name="tiny", n_ctx=n_ctx, threads=1)


class TestTinyMistral3(LlamaContract):
    """A rotary embedding with a magnitude, which llama.cpp cannot turn."""

    @pytest.fixture
    def make_model(self, tmp_path: Path) -> MakeModel:
        path = write_tiny_gguf(tmp_path / "tiny.gguf", architecture="mistral3", n_vocab=512)
        return lambda n_ctx: llama.load(path, name="tiny", n_ctx=n_ctx, threads=1)


class TestTinyWithOtherCaches(LlamaContract):
    atol = 1.5  # a last bit tips the rounding of a whole block, and sums of a few blocks are all that there is

    @pytest.fixture(params=["f32", "q8_0"])
    def make_model(self, request: pytest.FixtureRequest, qwen2_path: Path) -> MakeModel:
        return lambda n_ctx: llama.load(qwen2_path, name="tiny", n_ctx=n_ctx, threads=1, kv=request.param)


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
