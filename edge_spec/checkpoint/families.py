"""The families of checkpoints that our own graph builder knows, by `model_type`: names of tensors, and what differs.

Source: the modules of each family in transformers (`models/*/modeling_*.py`), and llama.cpp's converter
(`convert_hf_to_gguf.py`) for what a GGUF of them holds.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

_PLAIN = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_FUSED = {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"}
_JOINED = ("attn_q", "attn_k", "attn_v", "ffn_gate")
_FOUR_NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_OUTSIDE = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}

_BLOCK = re.compile(r"blk\.(\d+)\.([a-z_]+)\.(weight|bias)")
_LAYER = re.compile(r"model\.layers\.(0|[1-9]\d*)\.([a-z_.]+)\.(weight|bias)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """How the checkpoints of a `model_type` are laid out. `architecture` is their name in GGUF files."""

    architecture: str
    layers: Mapping[str, str] = field(default_factory=lambda: dict(_PLAIN))
    """Names of a layer's parts: a GGUF's to the checkpoint's."""
    permuted: bool = False
    """A GGUF has the rows of query and key in another order: a rotary pair side by side, where checkpoints have its
    halves apart."""
    shifted_norms: bool = False
    """A norm's gain is what is stored, plus one."""
    tied: bool = False
    """Embedding and head are one where the config does not say."""
    activations: tuple[str | None, ...] = ("silu",)
    """Values of `hidden_act` (or `hidden_activation`) that mean what the graph does; None: not said."""
    full_attention_every: int = 0
    """Every so many-th layer sees the whole context, the others a window, where the config has no `layer_types`."""

    def stored_name(self, name: str) -> str:
        """The checkpoint's name of a GGUF's tensor; the same name where there is none."""
        if match := _BLOCK.fullmatch(name):
            layer, part, kind = match.groups()
            return f"model.layers.{layer}.{self.layers[part]}.{kind}" if part in self.layers else name
        stem, _, kind = name.rpartition(".")
        return f"{_OUTSIDE[stem]}.{kind}" if stem in _OUTSIDE else name

    def gguf_name(self, stored: str) -> str:
        """The inverse of `stored_name`."""
        if match := _LAYER.fullmatch(stored):
            layer, part, kind = match.groups()
            found = next((ours for ours, theirs in self.layers.items() if theirs == part), None)
            return stored if found is None else f"blk.{layer}.{found}.{kind}"
        stem, _, kind = stored.rpartition(".")
        return next((f"{ours}.{kind}" for ours, theirs in _OUTSIDE.items() if theirs == stem), stored)


_GELU = ("gelu_pytorch_tanh", None)

FAMILIES = {
    "llama": Family(architecture="llama", permuted=True),
    "mistral": Family(architecture="llama", permuted=True),
    "smollm3": Family(architecture="smollm3", permuted=True, tied=True),
    "qwen2": Family(architecture="qwen2"),
    "qwen3": Family(architecture="qwen3", layers=_PLAIN | _HEAD_NORMS),
    "phi3": Family(
        architecture="phi3",
        layers={part: name for part, name in (_PLAIN | _FUSED).items() if part not in _JOINED},
    ),
    "gemma2": Family(
        architecture="gemma2",
        layers=_PLAIN | _FOUR_NORMS,
        shifted_norms=True,
        tied=True,
        activations=_GELU,
        full_attention_every=2,
    ),
    "gemma3_text": Family(
        architecture="gemma3",
        layers=_PLAIN | _FOUR_NORMS | _HEAD_NORMS,
        shifted_norms=True,
        tied=True,
        activations=_GELU,
        full_attention_every=6,
    ),
}
"""By `model_type` in config.json."""
