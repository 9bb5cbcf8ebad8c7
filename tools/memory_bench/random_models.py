"""Models with random weights, 20 to 110 MB each, for what the real ones at hand are not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

_EXPORTED = ("onnx", "native", "openvino", "llama")
_NOT_OPENVINO = ("onnx", "native", "llama")
_SIZES: dict[str, Any] = {"n_layer": 6, "hidden": 1024, "ff": 2816, "n_ctx": 4096, "n_vocab": 32000, "n_head": 16}


class RandomModel(NamedTuple):
    """How a model is written, and the backends that run it."""

    write: Callable[[Path], Path]
    backends: tuple[str, ...]


def _decoder(backends: tuple[str, ...] = _EXPORTED, **changes: Any) -> RandomModel:
    def write(path: Path) -> Path:
        from tests.tiny_models import write_tiny_gguf

        return write_tiny_gguf(path, **{**_SIZES, "n_kv_head": 4, "tensor_type": "Q4_K", **changes})

    return RandomModel(write, backends)


def _layered(architecture: str, **sizes: int) -> RandomModel:
    """What only llama.cpp runs."""

    def write(path: Path) -> Path:
        from tests.tiny_layers import write_layered_gguf

        wanted = {"n_layer": 6, "hidden": 512, "n_vocab": 32000, "n_ctx": 4096, "ff": 512, "n_head": 8, **sizes}
        return write_layered_gguf(path, architecture, tensor_type="Q4_K", **wanted)

    return RandomModel(write, ("llama",))


MODELS: Mapping[str, RandomModel] = {
    "random-gqa": _decoder(),
    "random-mha": _decoder(n_kv_head=16, tensor_type="Q8_0"),
    "random-mqa-untied": _decoder(n_kv_head=1, tied=False),
    "random-qwen3": _decoder(_NOT_OPENVINO, architecture="qwen3"),
    "random-windowed": _decoder(
        _NOT_OPENVINO, architecture="gemma3", metadata={"gemma3.attention.sliding_window": 512}
    ),
    "random-deep": _decoder(n_layer=20, hidden=512, n_head=8, n_kv_head=2, ff=2048, n_vocab=20000, tensor_type="Q6_K"),
    "random-fused": _decoder(_NOT_OPENVINO, architecture="phi3", hidden=768, n_head=8, ff=2048, n_kv_head=8),
    "random-gemma2": _decoder(
        _NOT_OPENVINO,
        architecture="gemma2",
        hidden=768,
        n_head=12,
        ff=3072,
        metadata={"gemma2.attention.sliding_window": 512},
    ),
    "random-moe": _layered("qwen3moe", n_expert=16),
    "random-mla": _layered("deepseek2", n_expert=8),
    "random-mamba": _layered("mamba", hidden=768),
    "random-falcon-h1": _layered("falcon-h1", hidden=768, ff=1536),
    "random-lfm2": _layered("lfm2", hidden=768, ff=1536),
}


def write_all(folder: Path, names: set[str]) -> dict[str, Path]:
    """The files of these models in `folder`, written unless they are there."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {name: folder / f"{name}.gguf" for name in names & MODELS.keys()}
    for name, path in paths.items():
        if not path.exists():
            partial_path = path.with_suffix(".partial")
            MODELS[name].write(partial_path)
            partial_path.rename(path)
    return paths
