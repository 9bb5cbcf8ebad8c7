"""The manifests in `models/`: what each model is and where it comes from, and which models make a pair."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from edge_spec.errors import ModelFormatError, UsageError
from edge_spec.store.hub import HubSource
from edge_spec.store.partial import Source
from edge_spec.store.wheels import WheelSource
from edge_spec.types import SamplingParams

_SOURCES: dict[str, Callable[..., Source]] = {"hub": HubSource, "wheels": WheelSource}
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """One model file, pinned by its size and hash, and the places that deliver it, in the order to try them."""

    name: str
    title: str
    file: str
    n_bytes: int
    sha256: str
    licence: str | None
    architecture: str | None
    sources: tuple[Source, ...]

    def __post_init__(self) -> None:
        if not re.fullmatch("[0-9a-f]{64}", self.sha256):
            raise UsageError("sha256 has to be 64 hexadecimal digits in lower case")
        if self.n_bytes <= 0:
            raise UsageError("bytes has to be positive")
        if Path(self.file).name != self.file or "\\" in self.file:
            raise UsageError(f"file {self.file!r} has to be a plain file name")


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """A target and the draft that goes with it, by name, and how a chat with them starts out."""

    name: str
    target: str
    draft: str
    system: str | None
    sampling: SamplingParams
    smaller_drafts: tuple[str, ...] = ()
    """Drafts that take less memory, the best first: where the draft does not fit, the first of them that is here and
    fits is taken."""


@dataclass(frozen=True, slots=True)
class Catalogue:
    """Every model and pair that is known, by name."""

    weights: Mapping[str, Weights]
    pairs: Mapping[str, Pair]


def manifest_folder() -> Path:
    """The folder of the manifests: in an installed wheel inside the package, in a checkout beside it."""
    package = Path(__file__).parents[1]
    inside = package / "models"
    return inside if inside.is_dir() else package.parent / "models"


def load_catalogue(folder: Path) -> Catalogue:
    """Read `folder`/weights/*.toml and `folder`/pairs/*.toml. Raises ModelFormatError if one is not well formed."""
    weights = {item.name: item for item in _load_all(folder / "weights", _weights)}
    pairs = {item.name: item for item in _load_all(folder / "pairs", _pair)}
    for pair in pairs.values():
        for part in (pair.target, pair.draft, *pair.smaller_drafts):
            if part not in weights:
                raise ModelFormatError(f"{folder}: the pair {pair.name!r} names {part!r}, which has no manifest")
        if pair.name in weights:
            raise ModelFormatError(f"{folder}: {pair.name!r} is the name of a pair and of a model")
    return Catalogue(weights, pairs)


def _load_all(folder: Path, parse: Callable[[dict[str, Any]], _T]) -> list[_T]:
    items = []
    for path in sorted(folder.glob("*.toml")):
        try:
            table = tomllib.loads(path.read_text(encoding="utf-8"))
            if table.get("name") != path.stem or not _NAME.fullmatch(path.stem):
                raise UsageError("the name has to be the file's, in lower case")  # noqa: TRY301
            items.append(parse(table))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError, KeyError, TypeError, UsageError) as exc:
            raise ModelFormatError(f"manifest {path}: {type(exc).__name__}: {exc}") from exc
    return items


def _weights(table: dict[str, Any]) -> Weights:
    sources = tuple(_source(source) for source in table.pop("sources"))
    return Weights(n_bytes=table.pop("bytes"), sources=sources, **table)


def _source(table: dict[str, Any]) -> Source:
    kind = table.pop("kind")
    if kind not in _SOURCES:
        raise UsageError(f"source kind {kind!r} is not one of {', '.join(_SOURCES)}")
    return _SOURCES[kind](**table)


def _pair(table: dict[str, Any]) -> Pair:
    sampling = SamplingParams(**table.pop("sampling", {}))
    smaller = tuple(table.pop("smaller_drafts", ()))
    return Pair(system=table.pop("system", None), sampling=sampling, smaller_drafts=smaller, **table)
