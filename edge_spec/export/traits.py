"""What sets each architecture apart, as data: the graph is built from this table and from the numbers in the file.

Source of every entry: the model's graph in llama.cpp (`src/models/`), whose logits the tests compare with.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Traits:
    """How a decoder differs from the plain one: RMS norms before attention and feed-forward network, rotary
    grouped-query attention, a gated network."""

    rope_interleaved: bool = False
    """Whether a rotary pair is (0, 1), (2, 3), … (files are permuted to that) or (0, d/2), (1, d/2 + 1), …"""
    unrotated_every: int = 0
    """Every so many-th layer has no rotary embedding."""
    activation: Literal["silu", "gelu_tanh"] = "silu"
    fused_inputs: bool = False
    """Query, key and value are one tensor of the file, and so are the network's gate and up projections."""
    qk_norm: bool = False
    """Each head's queries and keys are normed before they are rotated."""
    post_norms: bool = False
    """The outputs of attention and network are normed too, before they join the residual stream."""
    scaled_embedding: bool = False
    """Embeddings are multiplied by the square root of their width."""
    attention_softcap: float = 0.0
    """Scores s become cap · tanh(s / cap), with this cap in a file that does not say; 0: they stay."""
    logit_softcap: float = 0.0
    """The same for logits."""
    full_attention_every: int = 0
    """Every so many-th layer sees the whole context, the others a window; 0 where no layer has a window."""
    default_window: int = 0
    """Tokens that a windowed layer sees, itself included, in a file that does not say; 0: all of them."""
    local_rope_base: float = 0.0
    """Base of the rotary embedding in windowed layers, in a file that does not say; 0: the same as elsewhere."""
    coarse_scale_layers: int = 0
    """The model of so many layers divides its scores by √(hidden / heads), where others take the heads' width."""


TRAITS = {
    "llama": Traits(rope_interleaved=True),
    "mistral3": Traits(rope_interleaved=True),
    "smollm3": Traits(rope_interleaved=True, unrotated_every=4),
    "qwen2": Traits(),
    "qwen3": Traits(qk_norm=True),
    # The window that its files name is not applied: llama.cpp does not either, since converters wrote it wrongly.
    "phi3": Traits(fused_inputs=True),
    "gemma2": Traits(
        activation="gelu_tanh",
        post_norms=True,
        scaled_embedding=True,
        attention_softcap=50.0,
        logit_softcap=30.0,
        full_attention_every=2,
        default_window=4096,
        coarse_scale_layers=46,
    ),
    "gemma3": Traits(
        activation="gelu_tanh",
        qk_norm=True,
        post_norms=True,
        scaled_embedding=True,
        full_attention_every=6,
        local_rope_base=10000.0,
        coarse_scale_layers=62,
    ),
}
"""By `general.architecture`. llama includes Mistral, Llama 2 and 3, and SmolLM2."""

SUPPORTED = tuple(TRAITS)
"""GGUF architectures that the exporter builds."""
