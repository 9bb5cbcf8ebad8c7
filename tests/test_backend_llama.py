"""What the llama backend adds to the contract: loading, its refusals, and llama.cpp's failures in our terms."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_spec.backends import llama
from edge_spec.errors import (
    BackendError,
    BackendUnavailableError,
    ModelFormatError,
    ModelNotFoundError,
    RollbackUnsupportedError,
    UnsupportedArchitectureError,
    UsageError,
)
from edge_spec.types import Logits
from tests.tiny_layers import write_layered_gguf
from tests.tiny_models import write_tiny_gguf


def test_a_missing_library_is_named_with_its_install_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(BackendUnavailableError, match=r"pip install 'edge-spec\[llama\]'"):
        llama.load(tmp_path / "any.gguf", name="any")


@pytest.mark.parametrize("failure", ["OSError('no libllama.so')", "RuntimeError('no libllama.so')"])
def test_a_library_that_does_not_load_is_told_from_a_missing_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: str
) -> None:
    (tmp_path / "llama_cpp.py").write_text(f"raise {failure}")
    monkeypatch.syspath_prepend(tmp_path)
    for module in [name for name in sys.modules if name.split(".")[0] == "llama_cpp"]:
        monkeypatch.delitem(sys.modules, module)
    with pytest.raises(BackendUnavailableError, match=r"does not load \(no libllama.so\).*--force-reinstall"):
        llama.load(tmp_path / "any.gguf", name="any")


def test_a_library_without_its_own_dependency_says_which(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "llama_cpp.py").write_text("import a_module_that_is_not_there")
    monkeypatch.syspath_prepend(tmp_path)
    for module in [name for name in sys.modules if name.split(".")[0] == "llama_cpp"]:
        monkeypatch.delitem(sys.modules, module)
    with pytest.raises(BackendUnavailableError, match="lacks a_module_that_is_not_there"):
        llama.load(tmp_path / "any.gguf", name="any")


class TestWithLibrary:
    """Everything below runs llama.cpp."""

    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        return write_tiny_gguf(tmp_path / "tiny.gguf")

    @pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="file names are text there")
    def test_a_file_name_that_is_no_text_loads(self, path: Path) -> None:
        odd = path.rename(Path(os.fsdecode(os.fsencode(path.parent) + b"/\xff.gguf")))
        llama.load(odd, name="odd", n_ctx=16, threads=1).close()

    def test_a_missing_file_is_not_a_broken_one(self, tmp_path: Path) -> None:
        with pytest.raises(ModelNotFoundError, match="nowhere"):
            llama.load(tmp_path / "nowhere.gguf", name="any")

    @pytest.mark.parametrize("content", [b"", b"a text, not a model" * 9, b"GGUF", b"GGUF\3\0\0\0" + b"\xff" * 99])
    def test_rubbish_is_a_format_error(self, tmp_path: Path, content: bytes) -> None:
        path = tmp_path / "rubbish.gguf"
        path.write_bytes(content)
        with pytest.raises(ModelFormatError, match="rubbish"):
            llama.load(path, name="any")

    def test_what_only_llama_cpp_can_tell_is_a_format_error_with_its_reason(self, tmp_path: Path) -> None:
        path = write_tiny_gguf(tmp_path / "tiny.gguf", metadata={"llama.feed_forward_length": 1024})
        with pytest.raises(ModelFormatError, match=r"llama.cpp cannot load tiny.gguf: .*ffn.*wrong shape"):
            llama.load(path, name="any")

    @pytest.mark.parametrize("kept", [0.001, 0.5, 0.99])
    def test_a_truncated_file_is_a_format_error(self, path: Path, kept: float) -> None:
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * kept)])
        with pytest.raises(ModelFormatError):
            llama.load(path, name="any")

    def test_an_unknown_architecture_is_refused_by_name(self, path: Path) -> None:
        path.write_bytes(path.read_bytes().replace(b"llama", b"bogus"))
        with pytest.raises(UnsupportedArchitectureError, match="'bogus'"):
            llama.load(path, name="any")

    def test_an_unknown_pre_tokenizer_is_refused_by_name(self, tmp_path: Path) -> None:
        path = write_tiny_gguf(tmp_path / "tiny.gguf", metadata={"tokenizer.ggml.pre": "bogus"})
        with pytest.raises(UnsupportedArchitectureError, match="'bogus'"):
            llama.load(path, name="any")

    @pytest.mark.parametrize(
        "wrong",
        [
            {"n_ctx": 0},
            {"n_ctx": 513},
            {"threads": 0},
            {"max_rows": 0},
            {"n_batch": 0},
            {"max_rows": 9, "n_batch": 8},
            {"kv": "q8"},
        ],
    )
    def test_arguments_out_of_range_are_refused(self, path: Path, wrong: dict[str, Any]) -> None:
        with pytest.raises(UsageError, match=next(iter(wrong))):
            llama.load(path, name="any", **wrong)

    @pytest.mark.parametrize(("trained", "expected"), [(512, 512), (32768, 4096)])
    def test_the_window_defaults_to_4096_or_what_the_model_was_trained_for(
        self, tmp_path: Path, trained: int, expected: int
    ) -> None:
        model = llama.load(write_tiny_gguf(tmp_path / "tiny.gguf", n_ctx=trained), name="tiny")
        assert (model.spec.n_ctx, model.spec.n_ctx_train) == (expected, trained)
        model.close()

    def test_the_spec_counts_what_the_file_holds(self, path: Path) -> None:
        model = llama.load(path, name="tiny", max_rows=5)
        spec = model.spec
        model.close()
        assert (spec.name, spec.architecture, spec.n_layer, spec.n_kv_heads, spec.head_dim) == (
            "tiny",
            "llama",
            2,
            2,
            64,
        )
        assert spec.max_rows == 5
        assert spec.kv_bytes_per_token == 2 * 2 * 2 * 64 * 2  # layers, key and value, heads, width, bytes of f16
        assert 0 < path.stat().st_size - spec.weight_bytes < 20_000

    def test_a_token_takes_the_sum_of_its_layers_in_the_cache(self, tmp_path: Path) -> None:
        path = write_tiny_gguf(tmp_path / "tiny.gguf", n_layer=3, metadata={"llama.attention.head_count_kv": [2, 2, 2]})
        model = llama.load(path, name="tiny", threads=1)
        assert model.spec.kv_bytes_per_token == (2 + 2 + 2) * 2 * 64 * 2
        model.close()

    @pytest.mark.parametrize("architecture", ["llama", "qwen2"])
    @pytest.mark.parametrize("tensor_type", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q4_K", "Q6_K"])
    def test_every_tensor_type_runs(self, tmp_path: Path, architecture: str, tensor_type: str) -> None:
        path = write_tiny_gguf(tmp_path / "tiny.gguf", architecture=architecture, tensor_type=tensor_type)
        model = llama.load(path, name="tiny", threads=1)
        logits = model.decode([1, 2, 3], rows=3).logits
        assert np.isfinite(logits).all()
        assert logits.std() > 0.5
        model.close()

    def test_loading_and_decoding_print_nothing(self, path: Path, capfd: pytest.CaptureFixture[str]) -> None:
        model = llama.load(path, name="tiny", threads=1)
        model.decode([1, 2, 3])
        model.close()
        assert capfd.readouterr() == ("", "")

    def test_a_failed_decode_is_an_error_and_rollback_to_0_mends_it(
        self, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import llama_cpp

        model = llama.load(path, name="tiny", threads=1)
        expected = model.decode([1, 2, 3]).logits.copy()
        with monkeypatch.context() as broken:
            broken.setattr(llama_cpp, "llama_decode", lambda *_: -3)
            with pytest.raises(BackendError, match=r"code -3"):
                model.decode([4])
        model.rollback(0)
        assert np.array_equal(model.decode([1, 2, 3]).logits, expected)
        model.close()

    def test_a_context_that_cannot_be_made_is_an_error_with_a_remedy(
        self, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import llama_cpp

        monkeypatch.setattr(llama_cpp, "llama_init_from_model", lambda *_: None)
        with pytest.raises(BackendError, match="lower --ctx"):
            llama.load(path, name="tiny")

    @pytest.mark.parametrize("refusal", [("llama_memory_seq_rm", False), ("llama_memory_seq_pos_min", 3)])
    def test_a_cache_that_cannot_go_back_says_so_and_stays(
        self, path: Path, monkeypatch: pytest.MonkeyPatch, refusal: tuple[str, object]
    ) -> None:
        import llama_cpp

        name, answer = refusal
        model = llama.load(path, name="tiny", threads=1)
        expected = model.decode([1, 2, 3, 4, 5, 6]).logits.copy()
        model.rollback(0)
        model.decode([1, 2, 3, 4, 5])
        with monkeypatch.context() as refusing:
            refusing.setattr(llama_cpp, name, lambda *_: answer)
            with pytest.raises(RollbackUnsupportedError):
                model.rollback(2)
        assert model.length == 5
        np.testing.assert_allclose(model.decode([6]).logits, expected, rtol=0, atol=0.02)
        model.close()


@pytest.mark.parametrize("architecture", ["falcon-h1", "lfm2", "mamba"])
def test_a_model_with_a_recurrent_state_is_resumed_to_the_bit(architecture: str, tmp_path: Path) -> None:
    path = write_layered_gguf(tmp_path / "tiny.gguf", architecture, n_vocab=512)
    model = llama.load(path, name="tiny", n_ctx=256, threads=1)
    rng = np.random.default_rng(0)
    tokens, other = ([int(token) for token in rng.integers(0, 512, 110)] for _ in range(2))

    def go_on() -> list[Logits]:
        return [model.decode([token]).logits.copy() for token in tokens[100:]]

    model.decode(tokens[:100])
    expected = go_on()
    model.rollback(0)
    model.decode(tokens[:100])
    parked = model.park()
    model.rollback(0)
    model.decode(other)
    left = model.swap(parked)
    assert np.array_equal(go_on(), expected)
    model.resume(left)
    assert model.length == 110
    model.close()
