"""Facts from the header of a GGUF: no weight is read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from edge_spec.errors import ModelFormatError, UnsupportedArchitectureError
from edge_spec.export.architecture import DecoderConfig
from edge_spec.export.reading import read_config
from edge_spec.export.source import open_source
from edge_spec.export.trim import marked_ids
from edge_spec.formats.gguf import GGUFArray, GGUFFile
from edge_spec.memory.facts import ModelFacts, Origin
from edge_spec.memory.layers import by_layer, layers_of


def facts_of_gguf(path: Path, *, name: str | None = None, sha256: str | None = None) -> ModelFacts:
    """Facts of a GGUF file, or of a checkpoint's folder that reads like one.

    ModelNotFoundError, ModelFormatError, and UnsupportedArchitectureError (by name).
    """
    with open_source(path) as gguf:
        facts = read_facts(gguf, name=name or (path.resolve().name if path.is_dir() else path.stem), sha256=sha256)
    return replace(facts, origin=Origin.CHECKPOINT) if path.is_dir() else facts


def read_facts(gguf: GGUFFile, *, name: str, sha256: str | None = None) -> ModelFacts:
    """Facts of an open GGUF, of which only the header (and the small tables of rotary factors) need be there."""
    layers = layers_of(gguf)
    config, refusal = _exportable(gguf)
    embedding = gguf.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise ModelFormatError(f"{gguf.path}: no matrix token_embd.weight")
    n_expert = gguf.hparam_int("expert_count", 0)
    n_expert_used = gguf.hparam_int("expert_used_count", 0)
    return ModelFacts(
        name=name,
        origin=Origin.GGUF,
        architecture=gguf.architecture,
        hidden=gguf.hparam_int("embedding_length"),
        n_head=max(by_layer(gguf, "attention.head_count", len(layers)) or (1,)),
        n_ff=_active_width(gguf, len(layers), n_expert_used),
        n_vocab=embedding.shape[0],
        n_ctx_train=gguf.hparam_int("context_length"),
        layers=layers,
        tensors=dict(gguf.tensors),
        config=config,
        refusal=refusal,
        marked_ids=marked_ids(gguf),
        n_merges=count_merges(gguf),
        n_expert=n_expert,
        n_expert_used=n_expert_used,
        sha256=sha256,
    )


def count_merges(gguf: GGUFFile) -> int | None:
    """Merges of the tokenizer, None where it has no list of them."""
    merges = gguf.metadata.get("tokenizer.ggml.merges")
    return len(merges) if isinstance(merges, GGUFArray) else None


def _exportable(gguf: GGUFFile) -> tuple[DecoderConfig | None, str | None]:
    """What the exporter makes of it, or why it refuses."""
    try:
        return read_config(gguf), None
    except UnsupportedArchitectureError as exc:
        return None, str(exc)


def _active_width(gguf: GGUFFile, n_layer: int, n_expert_used: int) -> int:
    dense = max(by_layer(gguf, "feed_forward_length", n_layer) or (0,))
    experts = gguf.hparam_int("expert_feed_forward_length", dense) * n_expert_used
    return max(dense if not n_expert_used else 0, experts)
