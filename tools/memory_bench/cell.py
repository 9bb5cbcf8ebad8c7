"""One run whose memory is measured, and the grids of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

REAL = ("smollm2-135m", "qwen2.5-coder-0.5b")
TARGET, DRAFT = "qwen2.5-coder-1.5b", "qwen2.5-coder-0.5b"
DEFAULT_ROWS, DEFAULT_BATCH = 16, 128


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

    @property
    def is_plain(self) -> bool:
        """Whether it is a run as `Engine.load` makes it; else the backend is opened by itself."""
        return (self.batch, self.rows) == (DEFAULT_BATCH, DEFAULT_ROWS)

    @property
    def name(self) -> str:
        """What is said about it, in one word a choice."""
        words = [self.model, self.backend, str(self.n_ctx)]
        words += [f"draft={self.draft}"] if self.draft else []
        words += [f"kv={self.kv}"] if self.kv else []
        words += [] if self.is_plain else [f"batch={self.batch}", f"rows={self.rows}"]
        return " ".join(words)


def full_grid(backends: tuple[str, ...], random_models: dict[str, tuple[str, ...]]) -> Iterator[Cell]:
    """Model × backend × context × batch and rows × draft, the quick ones first.

    `random_models`: names, each with the backends that run it.
    """
    for backend in backends:
        for model, runs_on in random_models.items():
            if backend in runs_on:
                yield Cell(model=model, backend=backend, n_ctx=1024)
                yield Cell(model=model, backend=backend, n_ctx=4096)
    for backend in backends:
        for n_ctx in (256, 1024, 2048, 4096, 8192):
            yield Cell(model=REAL[0], backend=backend, n_ctx=n_ctx)
        for batch, rows in ((32, 16), (512, 16), (128, 4), (128, 64)):
            yield Cell(model=REAL[0], backend=backend, n_ctx=2048, batch=batch, rows=rows)
        for kv in KV_TYPES[backend]:
            yield Cell(model=REAL[0], backend=backend, n_ctx=2048, kv=kv)
        yield Cell(model=REAL[0], backend=backend, n_ctx=2048, draft=REAL[0])
    for backend in backends:
        for n_ctx in (512, 2048, 4096):
            yield Cell(model=REAL[1], backend=backend, n_ctx=n_ctx)
        yield Cell(model=REAL[1], backend=backend, n_ctx=2048, batch=512, rows=32)
        for kv in KV_TYPES[backend]:
            yield Cell(model=REAL[1], backend=backend, n_ctx=2048, kv=kv)
    for backend in backends:
        for n_ctx in (512, 2048, 4096):
            yield Cell(model=TARGET, backend=backend, n_ctx=n_ctx, draft=DRAFT)
        yield Cell(model=TARGET, backend=backend, n_ctx=2048)


KV_TYPES: dict[str, tuple[str, ...]] = {"onnx": (), "openvino": (), "llama": ()}
"""Types of cache elements beside the default, by backend."""
