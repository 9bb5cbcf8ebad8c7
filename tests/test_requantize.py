"""Laws of making a GGUF of another type: llama.cpp runs it, the store names it, and nothing half-made is left."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from edge_spec import cli
from edge_spec.backends import llama
from edge_spec.errors import (
    ModelFormatError,
    ModelNotFoundError,
    StorageError,
    UnsupportedArchitectureError,
    UsageError,
)
from edge_spec.export.requantize import GGUF_TYPES, check_type, requantize
from edge_spec.formats.gguf import GGUFFile
from edge_spec.store import Store
from tests.limited import run_limited
from tests.tiny_models import write_tiny_gguf

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_gguf(tmp_path_factory.mktemp("tiny") / "tiny.gguf", tensor_type="F16", tied=False)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    monkeypatch.setenv("EDGE_SPEC_HOME", str(tmp_path / "home"))

    def run(*args: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            cli.main(args)
        captured = capsys.readouterr()
        return int(caught.value.code or 0), captured.out, captured.err

    return run


def types_of(path: Path) -> set[str]:
    with GGUFFile(path) as gguf:
        return {tensor.type.name for tensor in gguf.tensors.values() if len(tensor.shape) == 2}


def logits_of(path: Path) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    model = llama.load(path, name="tiny", n_ctx=32, threads=1)
    try:
        return model.decode(range(1, 13), rows=12).logits.copy()
    finally:
        model.close()


@pytest.mark.parametrize(("file_type", "close"), [("Q4_0", 0.9), ("Q8_0", 0.999), ("Q4_K_M", 0.9), ("BF16", 0.9999)])
def test_llama_cpp_runs_what_was_made_and_it_means_the_same(
    file_type: str, close: float, tiny: Path, tmp_path: Path
) -> None:
    seen: list[tuple[int, int]] = []
    requantize(tiny, tmp_path / "out.gguf", file_type, threads=1, progress=lambda *counts: seen.append(counts))
    assert np.corrcoef(logits_of(tiny).ravel(), logits_of(tmp_path / "out.gguf").ravel())[0, 1] > close
    assert seen[-1][0] == seen[-1][1] > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.gguf"]


def test_pure_leaves_no_matrix_of_another_type(tiny: Path, tmp_path: Path) -> None:
    requantize(tiny, tmp_path / "mixed.gguf", "Q4_0", threads=1)
    requantize(tiny, tmp_path / "pure.gguf", "q4_0", threads=1, pure=True)
    assert types_of(tmp_path / "mixed.gguf") == {"Q4_0", "Q6_K"}
    assert types_of(tmp_path / "pure.gguf") == {"Q4_0"}


def test_what_is_quantised_already_can_be_quantised_once_more(tiny: Path, tmp_path: Path) -> None:
    requantize(tiny, tmp_path / "8.gguf", "Q8_0", threads=1)
    requantize(tmp_path / "8.gguf", tmp_path / "4.gguf", "Q4_0", threads=1)
    assert np.corrcoef(logits_of(tiny).ravel(), logits_of(tmp_path / "4.gguf").ravel())[0, 1] > 0.9


def test_every_type_that_is_offered_has_its_number_in_llama_cpp() -> None:
    from gguf.constants import LlamaFileType

    names = {kind.name for kind in LlamaFileType}
    assert {f"{'ALL' if name == 'F32' else 'MOSTLY'}_{name}" for name in GGUF_TYPES} <= names
    with pytest.raises(UsageError, match=r"Q4_0, .*Q4_K_M"):
        check_type("Q4_7")


def test_what_cannot_be_requantised_says_why(tiny: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.gguf"
    other.write_bytes(tiny.read_bytes().replace(b"llama", b"lambada"[:5]))
    with pytest.raises((UnsupportedArchitectureError, ModelFormatError), match=r"other\.gguf: "):
        requantize(other, tmp_path / "out.gguf", "Q4_0", threads=1)
    other.write_bytes(tiny.read_bytes()[:5000])
    with pytest.raises(ModelFormatError):
        requantize(other, tmp_path / "out.gguf", "Q4_0", threads=1)
    with pytest.raises(UsageError, match="exists already"):
        requantize(tiny, other, "Q4_0", threads=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other.gguf"]


@pytest.mark.parametrize("limit", [1 << 12, 1 << 18, 1 << 20])
def test_a_disk_that_fills_up_in_the_middle_leaves_nothing(limit: int, tiny: Path, tmp_path: Path) -> None:
    body = """
from edge_spec.export.requantize import requantize
requantize(Path(sys.argv[2]), Path(sys.argv[3]) / "out.gguf", "Q8_0", threads=1)
"""
    said = run_limited(limit, body, tiny, tmp_path)
    assert said.startswith("StorageError"), said
    assert list(tmp_path.iterdir()) == []


# The store


def test_the_issue_s_command_puts_a_named_model_into_the_store(run: Run, tiny: Path, tmp_path: Path) -> None:
    code, out, err = run("export", str(tiny), "--to", "gguf", "--type", "Q8_0", "--threads", "1")
    made = Store(tmp_path / "home").resolve("tiny-q8_0")
    assert (code, out.strip()) == (0, str(made.path))
    assert "called tiny-q8_0 in the store" in err
    stamp = made.path.stat().st_mtime_ns
    assert run("export", str(tiny), "--type", "Q8_0")[1].strip() == str(made.path)
    assert made.path.stat().st_mtime_ns == stamp, "it was made again"
    assert "tiny-q8_0" in run("models")[1]
    assert run("rm", "tiny-q8_0")[0] == 0
    with pytest.raises(ModelNotFoundError):
        Store(tmp_path / "home").resolve("tiny-q8_0")


def test_a_folder_or_a_file_can_be_named_instead(run: Run, tiny: Path, tmp_path: Path) -> None:
    code, out, _ = run("export", str(tiny), "--format", "gguf", "--to", str(tmp_path / "folder"), "--threads", "1")
    assert (code, out.strip()) == (0, str(tmp_path / "folder" / "tiny-q4_0.gguf"))
    code, out, _ = run("export", str(tiny), "--type", "Q8_0", "--to", str(tmp_path / "a.gguf"), "--threads", "1")
    assert (code, out.strip(), types_of(tmp_path / "a.gguf")) == (0, str(tmp_path / "a.gguf"), {"Q8_0"})


def test_a_draft_of_a_target_is_pure_and_has_its_vocabulary(run: Run, tiny: Path, tmp_path: Path) -> None:
    code, out, _ = run("export", str(tiny), "--to", "gguf", "--draft-of", str(tiny), "--threads", "1")
    assert (code, types_of(Path(out.strip()))) == (0, {"Q4_0"})
    other = write_tiny_gguf(tmp_path / "other.gguf", n_vocab=512, architecture="qwen2")
    with GGUFFile(tiny) as gguf:
        n_vocab = len(gguf.get_strings("tokenizer.ggml.tokens"))
    assert n_vocab < 512
    other.write_bytes(other.read_bytes().replace(b"<|im_end|>", b"<|in_end|>"))
    code, _, err = run("export", str(tiny), "--to", "gguf", "--draft-of", str(other))
    assert code == 1
    assert "to the target and" in err


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--type", "Q9"], "no GGUF type 'Q9'"),
        (["--to", "gguf", "--bits", "4"], "--bits is for ONNX"),
        (["--format", "tflite"], "choose one of onnx, gguf"),
        (["--pure"], "--pure is for --format gguf"),
        (["--name", "x"], "--name is for --format gguf"),
        (["--to", "gguf", "--name", "a/b"], "cannot be the new model's name"),
        (["--to", "gguf", "--name", "smollm2-135m"], "cannot be the new model's name"),
        (["--optimum-python", "python"], "--optimum-python is for the folder of a checkpoint"),
    ],
)
def test_options_that_do_not_go_together_are_refused(args: list[str], says: str, run: Run, tiny: Path) -> None:
    code, out, err = run("export", str(tiny), *args)
    assert (code, out) == (2, "")
    assert says in err


def test_a_failure_leaves_no_model_of_that_name(tiny: Path, tmp_path: Path) -> None:
    store, source = Store(tmp_path / "home"), Store(tmp_path / "home").resolve(tiny)

    def fail(path: Path) -> None:
        path.with_suffix(".partial").write_bytes(b"half")
        raise StorageError("full")

    with pytest.raises(StorageError, match="full"):
        store.make("new", fail, made_from="x", source=source)
    assert not (tmp_path / "home" / "models" / "new").exists()
    assert "new" not in [status.name for status in store.models()]


def test_a_kill_leaves_nothing_that_is_taken_for_a_model(tiny: Path, tmp_path: Path) -> None:
    script = """
import sys, time
from pathlib import Path
from edge_spec.store import Store
store = Store(Path(sys.argv[2]))
def make(path):
    path.with_name("half.gguf.partial").write_bytes(b"half")
    print("half", flush=True)
    time.sleep(60)
store.make("new", make, made_from="x", source=store.resolve(sys.argv[1]))
"""
    command = [sys.executable, "-c", script, str(tiny), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[1]) as child:
        assert child.stdout is not None
        child.stdout.readline()
        child.send_signal(signal.SIGKILL)
    store = Store(tmp_path)
    with pytest.raises(ModelNotFoundError):
        store.resolve("new")
    assert store.remove("new") == 4
    made = store.make(
        "new", lambda path: requantize(tiny, path, "Q8_0", threads=1), made_from="x", source=store.resolve(tiny)
    )
    assert store.resolve("new") == made
