"""The parts that an estimate is made of, and the settings that decide their sizes."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from enum import StrEnum

from edge_spec.cores import processor_features
from edge_spec.decoding.session import PREFILL_CHUNK
from edge_spec.errors import UsageError
from edge_spec.export.recipe import Recipe

BACKENDS = ("onnx", "native", "openvino", "llama")


class Owner(StrEnum):
    """Who holds a part."""

    TARGET = "target"
    DRAFT = "draft"
    PROCESS = "process"


class Source(StrEnum):
    """Where a number comes from: arithmetic on sizes in the file, or a measurement (`memory.runtime`)."""

    FORMULA = "formula"
    MEASURED = "measured"


@dataclass(frozen=True, slots=True, kw_only=True)
class Component:
    """One part of the memory, in bytes."""

    owner: Owner
    name: str
    committed_bytes: int = 0
    """Anonymous memory once the context is full."""
    mapped_bytes: int = 0
    """Of mapped files: the system may drop these pages and read them again."""
    touched_bytes: int = 0
    """The part of `mapped_bytes` that every token reads: in the working set."""
    load_bytes: int = 0
    """Anonymous memory for a moment of loading, in place of all that the same owner holds afterwards."""
    reserved_bytes: int = 0
    """Address space that is allocated and never touched: RLIMIT_DATA counts it, the machine does not."""
    source: Source = Source.FORMULA
    filled_later: bool = False
    """Whether it is touched only when text is read: not part of what loading leaves behind."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How the models would be run. What is None takes the engine's default."""

    backend: str = "onnx"
    draft_backend: str | None = None
    n_ctx: int = 4096
    kv: str | None = None
    """Type of cache elements (`memory.kv.KV_TYPES`); a draft on another backend keeps that one's own."""
    batch: int = PREFILL_CHUNK
    """Most tokens in a pass."""
    max_rows: int = 16
    """Most positions that a pass returns logits for."""
    threads: int = 2
    recipe: Recipe | None = None
    """How the target's export is stored; None follows the source."""
    draft_recipe: Recipe | None = None
    lookup: bool = True
    """Whether the text so far is indexed for copying."""
    history: bool = False
    """Whether past answers are."""
    parked: int = 0
    """Bytes that caches of other chats may hold."""
    full_windows: bool = True
    """Windowed layers keep the whole context."""
    machine: str = platform.machine()
    features: frozenset[str] | None = None
    """Processor extensions; None: those of this machine, if it is of the kind `machine`."""

    def __post_init__(self) -> None:
        for name in (self.backend, self.draft_backend):
            if name is not None and name not in BACKENDS:
                raise UsageError(f"backend={name!r}: choose one of {', '.join(BACKENDS)}")
        for label in ("n_ctx", "batch", "max_rows", "threads"):
            if getattr(self, label) < 1:
                raise UsageError(f"{label}={getattr(self, label)}: at least 1")
        if self.parked < 0:
            raise UsageError(f"parked={self.parked}: a number of bytes")

    @property
    def backend_of_draft(self) -> str:
        """Where the draft runs: as `loading.chosen_draft_backend` has it."""
        return self.draft_backend or ("onnx" if self.backend == "openvino" else self.backend)

    @property
    def cpu_features(self) -> frozenset[str]:
        """`features`, or this machine's; for a machine of another kind, those that its kind usually has."""
        if self.features is not None:
            return self.features
        if self.machine == platform.machine():
            return processor_features()
        return frozenset({"avx2"} if self.machine.lower() in ("x86_64", "amd64") else {"asimddp", "i8mm"})
