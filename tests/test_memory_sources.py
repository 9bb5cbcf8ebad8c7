"""Where facts of a model come from: checkpoints, configs, a hub's header, and the names of devices."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

from edge_spec.errors import DownloadError, ModelFormatError, UnsupportedArchitectureError, UsageError
from edge_spec.memory import Settings, estimate, facts_of_gguf
from edge_spec.memory.devices import load_devices, parse_budget
from edge_spec.memory.locate import find_facts
from edge_spec.memory.read_checkpoint import facts_of_checkpoint
from edge_spec.memory.training import weight_bytes
from edge_spec.store import Store
from tests.tiny_models import write_tiny_gguf

LLAMA_70B = {
    "model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64,
    "num_hidden_layers": 80, "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip
MIXTRAL_8X22B = {
    "model_type": "mixtral", "hidden_size": 6144, "intermediate_size": 16384, "num_attention_heads": 48,
    "num_hidden_layers": 56, "num_key_value_heads": 8, "vocab_size": 32000, "max_position_embeddings": 65536,
    "num_local_experts": 8, "num_experts_per_tok": 2, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip
COMMAND_R_PLUS = {
    "model_type": "cohere", "hidden_size": 12288, "intermediate_size": 33792, "num_attention_heads": 96,
    "num_hidden_layers": 64, "num_key_value_heads": 8, "vocab_size": 256000, "max_position_embeddings": 131072,
    "use_qk_norm": True, "torch_dtype": "float16",
}  # fmt: skip
DEEPSEEK_V2_LITE = {
    "model_type": "deepseek_v2", "hidden_size": 2048, "intermediate_size": 10944, "num_attention_heads": 16,
    "num_hidden_layers": 27, "num_key_value_heads": 16, "vocab_size": 102400, "max_position_embeddings": 163840,
    "kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128, "q_lora_rank": None,
    "n_routed_experts": 64, "num_experts_per_tok": 6, "n_shared_experts": 2, "moe_intermediate_size": 1408,
    "first_k_dense_replace": 1, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip


def write_config(folder: Path, config: dict[str, Any]) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(config))
    return path


@pytest.mark.parametrize(
    ("config", "published_gib", "billions"),
    [(COMMAND_R_PLUS, 193.72, 104), (MIXTRAL_8X22B, 262.63, 141), (LLAMA_70B, 131.5, 70.6)],
    ids=["command-r+", "mixtral-8x22b", "llama-3-70b"],
)
def test_published_weights_are_two_bytes_a_parameter_in_gib(
    tmp_path: Path, config: dict[str, Any], published_gib: float, billions: float
) -> None:
    facts = facts_of_checkpoint(write_config(tmp_path, config))

    # The published figures take the rounded number of parameters that is in a model's description.
    assert weight_bytes(billions * 1e9) / 2**30 == pytest.approx(published_gib, abs=0.01)
    assert weight_bytes(facts.n_parameters) / 2**30 == pytest.approx(published_gib, rel=0.005)
    assert facts.tensor_bytes / 2**30 == pytest.approx(published_gib, rel=0.005)


def test_latent_attention_caches_one_key_a_token_and_no_values(tmp_path: Path) -> None:
    facts = facts_of_checkpoint(write_config(tmp_path, DEEPSEEK_V2_LITE))

    counted = estimate(facts, None, Settings(backend="llama", n_ctx=1024))

    cache = next(part for part in counted.components if part.name == "cache")
    assert cache.committed_bytes == 27 * (512 + 64) * 2 * 1024
    assert facts.n_parameters == pytest.approx(15.7e9, rel=0.01)


def test_a_config_counts_as_the_gguf_that_is_made_of_it(tmp_path: Path) -> None:
    gguf = facts_of_gguf(write_tiny_gguf(tmp_path / "m.gguf", architecture="qwen2", tensor_type="F16", n_vocab=4096))
    gguf = replace(gguf, n_merges=None)  # a config does not list the tokenizer's merges
    config = {
        "model_type": "qwen2", "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4,
        "num_hidden_layers": 2, "num_key_value_heads": 2, "vocab_size": 4096, "max_position_embeddings": 512,
        "tie_word_embeddings": True, "torch_dtype": "float16",
    }  # fmt: skip

    facts = facts_of_checkpoint(write_config(tmp_path, config))

    assert {t.name: (t.shape, t.n_bytes) for t in facts.tensors.values()} == {
        t.name: (t.shape, t.n_bytes) for t in gguf.tensors.values()
    }
    for backend in ("onnx", "llama"):
        settings = Settings(backend=backend, n_ctx=512)
        assert estimate(facts, None, settings).committed_bytes == estimate(gguf, None, settings).committed_bytes


def write_safetensors(path: Path, elements: int, dtype: str = "BF16") -> None:
    header = json.dumps({"w": {"dtype": dtype, "shape": [elements], "data_offsets": [0, 0]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header)


def test_a_checkpoints_headers_have_to_agree_with_its_config(tmp_path: Path) -> None:
    write_config(tmp_path, LLAMA_70B)
    implied = facts_of_checkpoint(tmp_path / "config.json").n_parameters

    write_safetensors(tmp_path / "model.safetensors", implied, "F32")
    assert facts_of_checkpoint(tmp_path).tensor_bytes == 4 * implied

    write_safetensors(tmp_path / "model.safetensors", implied // 2)
    with pytest.raises(ModelFormatError, match="a part is missing"):
        facts_of_checkpoint(tmp_path)

    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 60) + b"{}")
    with pytest.raises(ModelFormatError, match="safetensors"):
        facts_of_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("config", "error"),
    [
        ({"model_type": "perceptron"}, UnsupportedArchitectureError),
        ({}, UnsupportedArchitectureError),
        (LLAMA_70B | {"hidden_size": "large"}, ModelFormatError),
        (LLAMA_70B | {"num_hidden_layers": 10**9}, ModelFormatError),
    ],
)
def test_a_config_that_is_not_known_or_not_sound_is_refused(
    tmp_path: Path, config: dict[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error):
        facts_of_checkpoint(write_config(tmp_path, config))


class Served(BaseHTTPRequestHandler):
    """As much of a hub as a header needs."""

    content = b""
    asked: ClassVar[list[str]] = []

    def log_message(self, format: str, *args: object) -> None:
        pass

    def answer(self, status: int, length: int, **headers: str) -> None:
        self.send_response(status)
        self.send_header("ETag", f'"{hashlib.sha256(self.content).hexdigest()}"')
        self.send_header("X-Repo-Commit", "c" * 40)
        self.send_header("Content-Length", str(length))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def do_HEAD(self) -> None:
        self.answer(200, len(self.content))

    def do_GET(self) -> None:
        if "/resolve/" not in self.path:
            self.send_error(404)
            return
        self.asked.append(self.headers["Range"])
        start, end = (int(number) for number in self.headers["Range"].removeprefix("bytes=").split("-"))
        body = self.content[start : end + 1]
        self.answer(206, len(body), Content_Range=f"bytes {start}-{end}/{len(self.content)}")
        self.wfile.write(body)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Served]]:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("time.sleep", lambda _: None)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Served)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_address[1]}")
    monkeypatch.setattr(Served, "asked", [])
    yield Served
    server.shutdown()
    server.server_close()
    thread.join()


def test_of_a_hub_file_only_the_header_and_the_rotary_tables_are_fetched(
    tmp_path: Path, hub: type[Served], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edge_spec.memory.read_hub.FIRST_BYTES", 4096)
    path = write_tiny_gguf(tmp_path / "m.gguf", architecture="phi3", tensor_type="F32", n_layer=4)
    hub.content = path.read_bytes()

    facts = find_facts(Store(tmp_path / "home"), "owner/repo:m.gguf")

    local = facts_of_gguf(path)
    assert facts.tensors == local.tensors
    assert facts.config == local.config
    ranges = [asked.removeprefix("bytes=").split("-") for asked in hub.asked]
    fetched = sum(int(end) - int(start) + 1 for start, end in ranges)
    assert len(ranges) > 2  # the header in several pieces, and the tables
    assert fetched < len(hub.content) / 10
    assert not list((tmp_path / "home").glob("models/*"))


ESTIMATING = """
import sys
from pathlib import Path
from edge_spec.cli import main
try:
    main()
finally:
    print(Path("/proc/self/status").read_text(), file=sys.stderr)
"""


@pytest.mark.real
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_command_takes_8_mib_of_the_network_and_150_of_memory(
    tmp_path: Path, hub: type[Served], smollm2_path: Path
) -> None:
    hub.content = smollm2_path.read_bytes()

    command = [sys.executable, "-c", ESTIMATING, "estimate", "owner/repo:m.gguf", "--ram", "64MiB", "--json"]
    child = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | {"EDGE_SPEC_HOME": str(tmp_path)}
    )

    assert child.returncode == 3, child.stderr
    told = json.loads(child.stdout)
    assert not told["fits"]
    settings = Settings(backend=told["backend"])  # the one that this machine would take
    assert told["committed_bytes"] == estimate(facts_of_gguf(smollm2_path), None, settings).committed_bytes
    assert hub.asked == [f"bytes=0-{(8 << 20) - 1}"]
    (peak,) = (line.split()[1] for line in child.stderr.splitlines() if line.startswith("VmHWM"))
    assert int(peak) < 150 << 10


def test_a_hub_that_does_not_answer_is_told_from_a_model_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(DownloadError, match="header"):
        find_facts(Store(tmp_path), "owner/repo:m.gguf")


def test_devices_have_a_budget_and_a_source(tmp_path: Path) -> None:
    devices = load_devices()

    assert {"raspberry-pi-4", "raspberry-pi-5", "pixel-8", "phone-12gb", "laptop-8gb", "laptop-16gb"} <= devices.keys()
    for device in devices.values():
        assert 0 < device.budget_bytes < device.memory_bytes
        assert device.bandwidth_bytes_per_s > 1e9
        assert device.source
    (tmp_path / "devices.toml").write_text("[x]\nmemory = 3\n")
    with pytest.raises(ModelFormatError, match=r"devices\.toml"):
        load_devices(tmp_path)


def test_a_budget_is_a_size_or_a_device() -> None:
    assert parse_budget("1.5GiB") == (3 << 29, None)
    assert parse_budget("512m") == (512 << 20, None)
    assert parse_budget("pixel-8")[0] == load_devices()["pixel-8"].budget_bytes
    with pytest.raises(UsageError, match="pixel-8"):
        parse_budget("pixel8")
    for nonsense in ("0", "-1GiB", "3GB", "", "nan"):
        with pytest.raises(UsageError):
            parse_budget(nonsense)
