"""One run whose memory is measured, and the grid of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

SMALL, DRAFT, TARGET = "smollm2-135m", "qwen2.5-coder-0.5b", "qwen2.5-coder-1.5b"
DEFAULT_ROWS, DEFAULT_BATCH = 16, 128

FITTED: Mapping[str, tuple[str, ...]] = {
    "random-gqa": ("onnx", "native", "llama", "openvino"),
    "random-mha": ("onnx", "native", "llama", "openvino"),
    "random-mqa-untied": ("onnx", "llama", "openvino"),
    "random-qwen3": ("onnx", "llama"),
    "random-windowed": ("onnx", "llama"),
    "random-gemma2": ("onnx",),
    SMALL: ("onnx", "native", "llama", "openvino"),
    DRAFT: ("onnx", "native"),
    TARGET: ("onnx", "native"),
}
"""Models, and backends, whose runs the estimate's measured constants were chosen by. All others are held out: they
tell how well the constants do where they were not fitted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """A run. What is None is left to the engine."""

    model: str
    """A model's name or path, or one of `random_models.MODELS`."""
    backend: str
    n_ctx: int
    draft: str | None = None
    kv: str | None = None
    """Type of the cache's elements."""
    batch: int = DEFAULT_BATCH
    """Tokens of the prompt in a pass."""
    rows: int = DEFAULT_ROWS
    """Most rows of logits in a pass."""
    threads: int = 2
    recipe: str | None = None
    """Not None: the model is exported by this recipe, and not run."""

    @property
    def is_plain(self) -> bool:
        """Whether it is a run as `Engine.load` makes it; else the backend is opened by itself."""
        return (self.batch, self.rows) == (DEFAULT_BATCH, DEFAULT_ROWS)

    @property
    def name(self) -> str:
        """What is said about it, in one word a choice."""
        if self.recipe is not None:
            return f"{self.model} export {self.recipe} threads={self.threads}"
        words = [self.model, self.backend, str(self.n_ctx)]
        words += [f"draft={self.draft}"] if self.draft else []
        words += [f"kv={self.kv}"] if self.kv else []
        words += [] if self.is_plain else [f"batch={self.batch}", f"rows={self.rows}"]
        return " ".join(words)

    @property
    def is_held_out(self) -> bool:
        """Whether no constant of the estimate was fitted to runs like it."""
        if self.recipe is not None:
            return self.model != SMALL
        # What the backend's own type was when constants were fitted.
        fitted = "f32" if self.backend in ("native", "openvino") else None
        return self.kv != fitted or self.backend not in FITTED.get(self.model, ())


def full_grid(backends: tuple[str, ...], random_models: Mapping[str, tuple[str, ...]]) -> Iterator[Cell]:
    """Model × backend × context × batch and rows × cache type × draft, the quick ones first, the pair's long
    windows last.

    `random_models`: names, each with the backends that run it.
    """
    for backend in backends:
        for model, runs_on in random_models.items():
            if backend in runs_on:
                yield Cell(model=model, backend=backend, n_ctx=1024)
                yield Cell(model=model, backend=backend, n_ctx=4096)
    for backend in backends:
        yield from _of_the_small_model(backend)
    for backend in backends:
        yield Cell(model=DRAFT, backend=backend, n_ctx=1024)
        yield Cell(model=DRAFT, backend=backend, n_ctx=2048, batch=512, rows=32)
    yield from _of_the_pair(backends, 1024)
    for backend in backends:
        if backend in SMALLEST_KV:
            yield Cell(model=TARGET, backend=backend, n_ctx=1024, draft=DRAFT, kv=SMALLEST_KV[backend])
    if "onnx" in backends:
        yield from _exports()
    for n_ctx in (2048, 4096):
        yield from _of_the_pair(backends, n_ctx)


def _of_the_pair(backends: tuple[str, ...], n_ctx: int) -> Iterator[Cell]:
    for backend in backends:
        yield Cell(model=TARGET, backend=backend, n_ctx=n_ctx, draft=DRAFT)
        if backend != "openvino":
            yield Cell(model=TARGET, backend=backend, n_ctx=n_ctx)


def limited_grid(backends: tuple[str, ...]) -> list[Cell]:
    """What is run under limits unless cells are named: the small model and the pair, on what of these `backends` the
    limits are for."""
    cells = [Cell(model=SMALL, backend=backend, n_ctx=n_ctx) for n_ctx in (256, 2048, 4096) for backend in LIMITED]
    cells += [Cell(model=TARGET, backend=backend, n_ctx=n_ctx, draft=DRAFT) for backend, n_ctx in LIMITED_PAIR]
    return [cell for cell in cells if cell.backend in backends]


LIMITED = ("onnx", "native", "llama")
"""Backends whose runs are run under limits."""
LIMITED_PAIR = (("onnx", 1024), ("native", 1024), ("llama", 1024), ("onnx", 2048))
"""Backends and windows that the pair is run under limits with."""


def _of_the_small_model(backend: str) -> Iterator[Cell]:
    for n_ctx in (256, 1024, 2048, 4096):
        yield Cell(model=SMALL, backend=backend, n_ctx=n_ctx)
    for batch, rows in ((32, 16), (512, 16), (128, 4), (128, 64)):
        yield Cell(model=SMALL, backend=backend, n_ctx=2048, batch=batch, rows=rows)
    for kv in KV_TYPES[backend]:
        yield Cell(model=SMALL, backend=backend, n_ctx=2048, kv=kv)
    yield Cell(model=SMALL, backend=backend, n_ctx=2048, draft=SMALL)


def _exports() -> Iterator[Cell]:
    for recipe in ("int4", "int8", "exact", "draft", "int4-accurate"):
        yield Cell(model=SMALL, backend="onnx", n_ctx=2, recipe=recipe)
    yield Cell(model=SMALL, backend="onnx", n_ctx=2, recipe="int4", threads=1)
    yield Cell(model="random-gqa", backend="onnx", n_ctx=2, recipe="int4-accurate")
    for model in ("random-mha", "random-mqa-untied", DRAFT, TARGET):
        yield Cell(model=model, backend="onnx", n_ctx=2, recipe="int4")
    yield Cell(model=DRAFT, backend="onnx", n_ctx=2, recipe="draft")


KV_TYPES: Mapping[str, tuple[str, ...]] = {
    "onnx": ("q8",),
    "native": ("f32",),
    "openvino": ("f32", "u8"),
    "llama": ("f32", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"),
}
"""Types of cache elements beside the default, by backend."""
SMALLEST_KV: Mapping[str, str] = {"onnx": "q8", "openvino": "u8", "llama": "q8_0"}
"""What the pair is run with besides, where there is a type smaller than the default."""
