"""What has to be known of a model to count its memory: geometry, layer by layer, and tensors; never their values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from edge_spec.export.architecture import DecoderConfig
from edge_spec.export.graph import StoredMatrix
from edge_spec.export.recipe import Recipe
from edge_spec.formats.gguf import TensorInfo


class Origin(StrEnum):
    """Where facts were read from."""

    GGUF = "gguf"
    EXPORT = "export"
    CHECKPOINT = "checkpoint"
    CONFIG = "config"


@dataclass(frozen=True, slots=True)
class Layer:
    """What one layer keeps of a sequence. All zero for a layer that keeps nothing.

    An attention layer keeps `kv_heads` keys of `key_dim` and values of `value_dim` elements a token; with multi-head
    latent attention (arXiv 2405.04434) that is one key a token and no value. A recurrent layer keeps `conv_state` and
    `recurrent_state` float32 elements whatever the context's length. A hybrid layer may keep both.
    """

    kv_heads: int = 0
    key_dim: int = 0
    value_dim: int = 0
    window: int = 0
    """Tokens that the layer sees, 0: all of them."""
    conv_state: int = 0
    recurrent_state: int = 0

    @property
    def key_width(self) -> int:
        """Elements of a token's keys."""
        return self.kv_heads * self.key_dim

    @property
    def value_width(self) -> int:
        """Elements of a token's values."""
        return self.kv_heads * self.value_dim


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ModelFacts:
    """A model as far as memory is concerned. `tensors` have the names of GGUF files, whatever the source.

    Facts equal themselves only, so that what is worked out of them can be kept by them.
    """

    name: str
    origin: Origin
    architecture: str
    hidden: int
    n_head: int
    n_ff: int
    """Width of the feed-forward network in the widest layer; of all experts that a token uses, in a mixture."""
    n_vocab: int
    n_ctx_train: int
    layers: tuple[Layer, ...]
    tensors: Mapping[str, TensorInfo]
    config: DecoderConfig | None
    """What the exporter reads of it; None where it refuses the model."""
    refusal: str | None = None
    """Why the exporter refuses it."""
    marked_ids: NDArray[np.int64]
    """Tokens that a trimmed head keeps wherever they stand."""
    n_merges: int | None = None
    """Merges of a byte-pair tokenizer; None where the source does not list them."""
    n_expert: int = 0
    n_expert_used: int = 0
    recipe: Recipe | None = None
    """How an export is stored; None for other sources."""
    matrices: tuple[StoredMatrix, ...] | None = None
    """An export's matrices; None for other sources."""
    sha256: str | None = None
    """Hash of the source where it is known; measured figures are kept by it."""

    @property
    def runs_on_llama(self) -> bool:
        """Whether llama.cpp may run it as it is: a GGUF, or one that could be made where there is only a config."""
        return self.origin in (Origin.GGUF, Origin.CONFIG)

    @property
    def n_layer(self) -> int:
        """Number of layers."""
        return len(self.layers)

    @property
    def merges(self) -> int:
        """Merges of the tokenizer; about as many as tokens where the source does not list them."""
        return self.n_vocab if self.n_merges is None else self.n_merges

    @property
    def n_parameters(self) -> int:
        """Elements of all tensors."""
        return sum(tensor.n_elements for tensor in self.tensors.values())

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all tensors as they are stored."""
        return sum(tensor.n_bytes for tensor in self.tensors.values())

    @property
    def embedding(self) -> TensorInfo:
        """The table that tokens are looked up in."""
        return self.tensors["token_embd.weight"]

    @property
    def tied(self) -> bool:
        """Whether the embedding table is the output head too."""
        return "output.weight" not in self.tensors

    @property
    def is_recurrent(self) -> bool:
        """Whether some layer keeps a state that cannot be shortened."""
        return any(layer.conv_state or layer.recurrent_state for layer in self.layers)
