"""From what a user names to the facts of a model, without its weights."""

from __future__ import annotations

from pathlib import Path

from edge_spec.checkpoint.folder import TOKENIZER
from edge_spec.errors import ModelNotFoundError
from edge_spec.export.folder import is_export
from edge_spec.export.source import refusal_of
from edge_spec.memory.facts import ModelFacts
from edge_spec.memory.read_checkpoint import CONFIG, facts_of_checkpoint
from edge_spec.memory.read_export import facts_of_export
from edge_spec.memory.read_gguf import facts_of_gguf
from edge_spec.memory.read_hub import facts_of_hub
from edge_spec.store import Store
from edge_spec.store.hub import HubSource, parse_reference
from edge_spec.store.manifest import Weights


def find_facts(store: Store, ref: str) -> ModelFacts:
    """Facts of a model that is named by its manifest, a hub reference (`owner/repo:file.gguf`), or a path.

    A path is a GGUF, an export's folder, a checkpoint's folder, or a bare `config.json`. What is not on this machine is
    asked for at the hub, of which only the header is read. Raises ModelNotFoundError, DownloadError, ModelFormatError,
    UnsupportedArchitectureError.
    """
    try:
        path = Path(ref).expanduser()
        if is_export(path):
            return facts_of_export(path)
        if path.is_dir() and _reads_like_a_gguf(path):
            return facts_of_gguf(path)
        if path.name.endswith(".json") or (path / CONFIG).is_file():
            return facts_of_checkpoint(path)
    except (OSError, RuntimeError) as exc:  # no such user, a name that is too long
        raise ModelNotFoundError(f"{ref} cannot be read: {exc}") from exc
    if path.is_file() and store.is_path(ref):
        return facts_of_gguf(path)  # without its hash, which takes seconds and decides nothing here
    source = _hub_source(store, ref)
    try:
        local = store.resolve(ref)
    except ModelNotFoundError:
        if source is None:
            raise
        return facts_of_hub(source, name=ref)
    return facts_of_gguf(local.path, name=local.name, sha256=local.sha256)


def _reads_like_a_gguf(folder: Path) -> bool:
    """Whether a folder is a whole checkpoint that our own graph builder takes."""
    if not all((folder / name).is_file() for name in (CONFIG, TOKENIZER)) or not any(folder.glob("*.safetensors")):
        return False
    return refusal_of(folder) is None


def _hub_source(store: Store, ref: str) -> HubSource | None:
    """Where a model that is not here could be looked at; None where it has no place on the hub."""
    weights: Weights | None = store.weights(ref)
    if weights is None:
        return parse_reference(ref)
    return next((source for source in weights.sources if isinstance(source, HubSource)), None)
