from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from edge_spec import cli
from tests.tiny_models import write_tiny_gguf

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    monkeypatch.setenv("EDGE_SPEC_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("EDGE_SPEC_DEBUG", raising=False)

    def run(*args: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            cli.main(["estimate", *args])
        captured = capsys.readouterr()
        return int(caught.value.code or 0), captured.out, captured.err

    return run


@pytest.fixture
def model(tmp_path: Path) -> str:
    return str(write_tiny_gguf(tmp_path / "m.gguf", tensor_type="Q4_0", n_ctx=8192))


def test_json_has_the_totals_and_their_parts(run: Run, model: str) -> None:
    code, out, _ = run(model, "--draft", model, "--ctx", "1024", "--ram", "2GiB", "--json", "--backend", "onnx")

    told = json.loads(out)
    assert code == 0
    assert (told["fits"], told["working_set_fits"]) == (True, True)
    assert (told["budget_bytes"], told["n_ctx"], told["largest_n_ctx"]) == (2 << 30, 1024, 8192)
    assert told["committed_bytes"] == sum(part["committed_bytes"] for part in told["components"])
    assert told["working_set_bytes"] == sum(part["working_set_bytes"] for part in told["components"])
    assert {part["owner"] for part in told["components"]} == {"target", "draft", "process"}
    assert {part["source"] for part in told["components"]} == {"formula", "measured"}
    assert told["tokens_per_s"] > 0
    saved = [lever["saved_bytes"] for lever in told["levers"]]
    assert saved == sorted(saved, reverse=True)
    assert "--drafter lookup" in [lever["option"] for lever in told["levers"]]


@pytest.mark.parametrize(("backend", "times"), [("onnx", 1), ("native", 1), ("openvino", 1), ("llama", 2)])
def test_parked_chats_have_a_line_of_their_own(run: Run, model: str, backend: str, times: int) -> None:
    without = json.loads(run(model, "--ram", "4GiB", "--backend", backend, "--json")[1])
    told = json.loads(run(model, "--ram", "4GiB", "--backend", backend, "--parked", "256MiB", "--json")[1])
    (part,) = [part for part in told["components"] if part["name"] == "parked chats"]
    assert part["committed_bytes"] == times * (256 << 20)
    assert told["committed_bytes"] - without["committed_bytes"] == times * (256 << 20)
    assert "without --parked" in [lever["option"] for lever in told["levers"]]
    assert "parked chats" in run(model, "--ram", "4GiB", "--parked", "256MiB")[1]


def test_what_does_not_fit_exits_with_3_and_says_what_would(run: Run, model: str) -> None:
    _, out, _ = run(model, "--ctx", "8192", "--ram", "2GiB", "--json")
    told = json.loads(out)
    needed = max(told["committed_bytes"], told["load_peak_bytes"]) + told["band_bytes"]

    code, out, _ = run(model, "--ctx", "8192", "--ram", str(needed - (2 << 20)))

    assert code == 3
    assert "does not fit" in out
    assert "enough would be" in out


LLAMA_70B = {
    "model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64,
    "num_hidden_layers": 80, "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip


def test_mapped_weights_that_no_memory_is_left_for_are_said_to_come_from_the_disk(run: Run, tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps(LLAMA_70B))

    code, out, _ = run(str(config), "--backend", "llama", "--ram", "laptop-16gb", "--json")

    told = json.loads(out)
    assert (code, told["fits"], told["working_set_fits"]) == (0, True, False)
    assert "from the disk each time" in told["verdict"]
    assert "were all of it in memory" in told["tokens_per_s_source"]
    code, out, _ = run(str(config), "--backend", "onnx", "--ram", "laptop-16gb")
    assert (code, "--backend llama)" in out) == (3, True)
    assert "no single change is enough" in out  # it would only read the weights again for each token


def test_a_budget_that_nothing_fits_names_no_context(run: Run, model: str) -> None:
    code, out, _ = run(model, "--ram", "16MiB", "--json")

    assert code == 3
    assert json.loads(out)["largest_n_ctx"] is None


def test_the_table_is_for_people(run: Run, model: str) -> None:
    code, out, err = run(model, "--ram", "pixel-8", "--backend", "llama", "--kv", "q8_0")

    assert (code, err) == (0, "")
    assert all(word in out for word in ("weights", "cache", "tokenizer", "COMMITTED", "fits", "GB/s of pixel-8"))


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_training_is_counted_instead(run: Run, model: str, kind: str) -> None:
    code, out, _ = run(model, "--training", kind, "--ram", "8GiB", "--json")

    told = json.loads(out)
    assert code == 0
    assert [part["name"] for part in told["components"]] == ["weights", "gradients", "optimiser", "activations"]
    assert told["committed_bytes"] == sum(part["committed_bytes"] for part in told["components"])


@pytest.mark.parametrize(
    "args",
    [
        ("--ram", "much"),
        ("--ctx", "100000"),
        ("--parked", "some"),
        ("--kv", "q9_0"),
        ("--backend", "onnx", "--kv", "q8_0"),
        ("--backend", "llama", "--recipe", "int4"),
        ("--draft-backend", "llama"),
        ("--recipe", "int3"),
        ("--training", "some"),
    ],
)
def test_options_that_cannot_be_honoured_are_bad_usage(run: Run, model: str, args: tuple[str, ...]) -> None:
    code, out, err = run(model, *args)

    assert (code, out) == (2, "")
    assert err


def test_a_model_that_is_not_there_is_a_failure(run: Run) -> None:
    assert run("no-such-model")[0] == 1


def test_an_estimate_loads_no_inference_library(model: str, tmp_path: Path) -> None:
    script = (
        "import sys\nfrom edge_spec.cli import main\n"
        "try:\n    main(['estimate', sys.argv[1], '--json'])\n"
        "finally:\n    heavy = {'onnxruntime', 'onnx', 'gguf', 'tokenizers', 'openvino', 'llama_cpp', 'torch'}\n"
        "    print(sorted(heavy & set(sys.modules)), file=sys.stderr)\n"
    )
    environment = {"EDGE_SPEC_HOME": str(tmp_path), "PATH": "/usr/bin"}
    done = subprocess.run(
        [sys.executable, "-c", script, model], capture_output=True, text=True, check=True, env=environment
    )

    assert done.stderr.strip() == "[]"
