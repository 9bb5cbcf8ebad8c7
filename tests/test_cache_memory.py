"""Laws of a cache's memory and of turned keys, below the contract: a smaller cache gives memory back to the system."""

from __future__ import annotations

import mmap
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from edge_spec.backends._mapped_file import drop_file_pages
from edge_spec.backends._rotation import turn_keys
from edge_spec.export.architecture import DecoderConfig
from edge_spec.export.reading import read_config
from edge_spec.formats.gguf import GGUFFile
from tests.tiny_models import PECULIARITIES, write_tiny_gguf

MEASURE = """
import sys
from pathlib import Path

def anonymous() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))

kind, path, kernels_dir = sys.argv[1:]
if kind == "llama":
    from edge_spec.backends import llama
    model = llama.load(Path(path), name="tiny", n_ctx=2048, threads=1)
else:
    from edge_spec.export import open_export
    more = {}
    if kind == "onnx":
        from edge_spec.backends.onnx import OnnxModel as Model
    elif kind == "native":
        from edge_spec.backends.native import NativeModel as Model
        more["kernels_dir"] = Path(kernels_dir)
    else:
        from edge_spec.backends.openvino import OpenVinoModel as Model
    model = Model(open_export(Path(path)), name="tiny", n_ctx=2048, threads=1, **more)
for _ in range(4):
    model.decode([1] * 512, rows=0)
cache_bytes = 2048 * model.spec.kv_bytes_per_token
full = anonymous()
model.evict(10, 2040)
model.resize(256)
model.decode([1])
print((full - anonymous()) / cache_bytes)
"""


MEASURE_PARKED = """
import sys
from pathlib import Path

def anonymous() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))

kind, path, kernels_dir = sys.argv[1:]
if kind == "llama":
    from edge_spec.backends import llama
    model = llama.load(Path(path), name="tiny", n_ctx=2048, threads=1)
else:
    from edge_spec.export import open_export
    more = {}
    if kind == "onnx":
        from edge_spec.backends.onnx import OnnxModel as Model
    elif kind == "native":
        from edge_spec.backends.native import NativeModel as Model
        more["kernels_dir"] = Path(kernels_dir)
    else:
        from edge_spec.backends.openvino import OpenVinoModel as Model
        more["park_bytes"] = 64 << 20
    model = Model(open_export(Path(path)), name="tiny", n_ctx=2048, threads=1, **more)

def fill(token: int, start: int = 0) -> None:
    model.rollback(start)
    while model.length < 1536:
        model.decode([token] * 256, rows=0)

fill(1)
empty = anonymous()
parked = model.park()
fill(2)
parked = model.swap(parked)
full = anonymous()
told = parked.n_bytes
fill(3, 512)
shared = model.park()
fill(4, 1024)
more = anonymous()
shared_bytes = shared.n_bytes
parked.free()
shared.free()
model.rollback(model.length)
freed = anonymous()
cache_bytes = 1536 * model.spec.kv_bytes_per_token
print(*[n / cache_bytes for n in (full - empty, told, more - full, shared_bytes, freed - empty)])
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not tell")
@pytest.mark.parametrize("kind", ["onnx", "native", "llama", pytest.param("openvino", marks=pytest.mark.openvino)])
def test_a_parked_sequence_holds_what_it_says_and_gives_it_back(kind: str, tmp_path: Path, kernels_dir: Path) -> None:
    path = write_tiny_gguf(tmp_path / "tiny.gguf", n_vocab=512, n_ctx=2048, n_kv_head=4, n_layer=8)
    if kind != "llama":
        from edge_spec.export import RECIPES, export_model

        export_model(path, RECIPES["int4"], tmp_path / "out", sha256="0" * 64, threads=1)
        path = tmp_path / "out"
    command = [sys.executable, "-c", MEASURE_PARKED, kind, str(path), str(kernels_dir)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    held, told, more, shared, left = map(float, done.stdout.split())
    assert told == pytest.approx(1, abs=0.03)
    assert held == pytest.approx(1, abs=0.2)
    # The first 1,024 tokens are in the cache too: only openvino has them in the same blocks.
    assert shared == pytest.approx(1 / 3 if kind == "openvino" else 1, abs=0.03)
    assert more == pytest.approx(shared, abs=0.2)
    assert abs(left) < 0.2


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not tell")
@pytest.mark.parametrize("kind", ["onnx", "native", "llama", pytest.param("openvino", marks=pytest.mark.openvino)])
def test_a_smaller_cache_gives_its_memory_back(kind: str, tmp_path: Path, kernels_dir: Path) -> None:
    path = write_tiny_gguf(tmp_path / "tiny.gguf", n_vocab=512, n_ctx=2048, n_kv_head=4, n_layer=4)
    if kind != "llama":
        from edge_spec.export import RECIPES, export_model

        export_model(path, RECIPES["int4"], tmp_path / "out", sha256="0" * 64, threads=1)
        path = tmp_path / "out"
    command = [sys.executable, "-c", MEASURE, kind, str(path), str(kernels_dir)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert float(done.stdout) > 0.8


def config_of(folder: Path, architecture: str) -> DecoderConfig:
    with GGUFFile(write_tiny_gguf(folder / "tiny.gguf", architecture=architecture, n_layer=4, n_vocab=512)) as gguf:
        return read_config(gguf)


@pytest.mark.parametrize("architecture", sorted(PECULIARITIES))
def test_a_turned_key_is_the_key_of_the_other_position(architecture: str, tmp_path: Path) -> None:
    """Against the tables that the attention of an export rotates by."""
    config = config_of(tmp_path, architecture)
    keys = np.random.default_rng(0).standard_normal((3, config.head_dim)).astype(np.float32)
    tables = config.rope_inputs(128, 128)
    first, second = config.rope_pairs
    for layer in range(config.n_layer):

        def placed(position: int, names: tuple[str, ...] = config.rope_of(layer)) -> np.ndarray:
            rotated = keys.copy()
            if names:
                cos, sin = (tables[name][position] for name in names)
                rotated[:, first] = keys[:, first] * cos - keys[:, second] * sin
                rotated[:, second] = keys[:, second] * cos + keys[:, first] * sin
            return rotated

        for source, target in ((100, 3), (5, 4), (0, 90)):
            angles = (target - source) * config.rope_frequencies(layer, 128)
            np.testing.assert_allclose(turn_keys(config, placed(source), angles), placed(target), rtol=0, atol=2e-5)


def test_what_is_too_large_for_16_bits_once_it_is_turned_is_the_largest_number(tmp_path: Path) -> None:
    """An infinite key would make scores that are no numbers."""
    config = config_of(tmp_path, "llama")
    keys = np.full((1, config.head_dim), 60_000, np.float16)
    turned = turn_keys(config, keys, np.full(len(config.rope_pairs[0]), 0.25 * np.pi))
    np.testing.assert_array_equal(turned[:, config.rope_pairs[1]], np.float16(65504))
    np.testing.assert_allclose(turned[:, config.rope_pairs[0]], 0, atol=16)


def test_a_window_past_the_short_one_turns_what_is_cached_to_its_own_embedding(tmp_path: Path) -> None:
    from edge_spec.backends.onnx import OnnxModel
    from edge_spec.export import RECIPES, export_model

    source = write_tiny_gguf(tmp_path / "tiny.gguf", architecture="phi3", n_layer=1, n_vocab=512, tensor_type="F16")
    # Fine steps: a key that was turned differs by a rounding, which long blocks of activations can make much of.
    export = export_model(source, RECIPES["int8"], tmp_path / "out", sha256="0" * 64, threads=1)
    assert export.config.rope_short_ctx == 256
    tokens = [int(token) for token in np.random.default_rng(1).integers(0, 512, 40)]
    short, long = (OnnxModel(export, name="tiny", n_ctx=n_ctx, threads=1) for n_ctx in (256, 257))
    expected = long.decode(tokens).logits.copy()
    other = short.decode(tokens).logits.copy()
    short.rollback(30)
    parked = short.park()
    short.rollback(0)
    short.resize(257)
    short.resume(parked)
    np.testing.assert_allclose(short.decode(tokens[30:]).logits, expected, rtol=0, atol=0.02)
    short.resize(256)
    short.rollback(0)
    short.decode(tokens[:30])
    short.resize(257)
    resized = short.decode(tokens[30:]).logits
    np.testing.assert_allclose(resized, expected, rtol=0, atol=0.02)
    assert np.abs(other - expected).max() > 0.1
    short.close()
    long.close()


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="the system does not tell")
def test_mapped_pages_that_were_copied_are_dropped_and_come_back(tmp_path: Path) -> None:
    size = 64 * mmap.PAGESIZE
    file = tmp_path / "weights.bin"
    file.write_bytes(bytes([7]) * size)

    def resident() -> int:
        told = Path("/proc/self/smaps").read_text().split(str(file))[1]
        return int(told.split("Rss:")[1].split()[0]) << 10

    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, flags=mmap.MAP_PRIVATE) as pages:
        assert sum(pages[:: mmap.PAGESIZE]) == 7 * 64
        assert resident() == size
        drop_file_pages(file)
        assert resident() == 0
        assert sum(pages[:: mmap.PAGESIZE]) == 7 * 64
        pages[0] = 1  # a page of our own now
        drop_file_pages(file)
        assert pages[0] == 1
