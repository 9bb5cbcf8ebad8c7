"""What the tests of the store share: scripted sources, and stores that know one tiny model."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from edge_spec.store import Store
from edge_spec.store.manifest import Catalogue, Weights
from edge_spec.store.partial import Partial, Source

CONTENT = bytes(range(256)) * 40
"""The tiny model's bytes."""


@dataclass(frozen=True)
class Scripted:
    """A source that does what a function says."""

    script: Callable[[Partial], None]
    title: str = "scripted"
    scratch_bytes: int = 0

    def fetch(self, partial: Partial) -> None:
        self.script(partial)


def rest(partial: Partial) -> None:
    """Deliver what is missing, rightly."""
    partial.append(CONTENT[partial.size :])


def weights_from(*sources: Source, content: bytes = CONTENT) -> Weights:
    return Weights(
        name="tiny",
        title="Tiny",
        file="tiny.gguf",
        n_bytes=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
        licence="MIT",
        architecture="llama",
        sources=sources,
    )


def store_with(data_dir: Path, *sources: Source) -> Store:
    """A store whose only manifest is the tiny model's."""
    store = Store(data_dir)
    store.__dict__["_catalogue"] = Catalogue({"tiny": weights_from(*sources)}, {})
    return store
