"""Models on this machine: manifests, downloads, hashes, local paths."""

from edge_spec.store.manifest import Pair
from edge_spec.store.store import DEFAULT_PAIR, LocalModel, ModelStatus, Store

__all__ = ["DEFAULT_PAIR", "LocalModel", "ModelStatus", "Pair", "Store"]
