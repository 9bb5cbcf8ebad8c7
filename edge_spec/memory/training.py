"""Memory of fine-tuning: weights, gradients, the optimiser's moments, activations.

Counted for PyTorch with AdamW (arXiv 1711.05101) and attention that does not store its scores. In float32 a parameter
takes 4 bytes and its gradient 4, each moment 4; in mixed precision (arXiv 1710.03740) weight and gradient take 2 each,
and the float32 copy and the moments 12. LoRA (arXiv 2106.09685) freezes the weights and trains two thin matrices beside
each projection of attention.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from edge_spec.errors import UnsupportedArchitectureError, UsageError
from edge_spec.memory.facts import ModelFacts

ADAPTED = ("attn_q", "attn_k", "attn_v", "attn_output", "attn_qkv")
"""Projections that LoRA adapts by default."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingSettings:
    """How a model would be fine-tuned. `lora_rank` 0 trains all weights."""

    lora_rank: int = 0
    batch: int = 1
    """Sequences in a step."""
    sequence: int = 512
    """Tokens of a sequence."""
    checkpointing: bool = False
    """Keep only what goes into each layer, and compute the layer again on the way back (arXiv 1604.06174)."""
    mixed: bool = False
    """16-bit weights, gradients and activations beside float32 master weights; else all float32."""

    def __post_init__(self) -> None:
        if min(self.batch, self.sequence) < 1 or self.lora_rank < 0:
            raise UsageError("a step of training needs at least one sequence of one token, and no negative rank")


@dataclass(frozen=True)
class TrainingEstimate:
    """Bytes of one training step by part, without the process's own."""

    facts: ModelFacts
    settings: TrainingSettings
    weights_bytes: int
    gradients_bytes: int
    optimiser_bytes: int
    activations_bytes: int
    trained_parameters: int

    @cached_property
    def total_bytes(self) -> int:
        """All parts: gradients are there when the last activations still are."""
        return self.weights_bytes + self.gradients_bytes + self.optimiser_bytes + self.activations_bytes


def weight_bytes(n_parameters: float, bytes_per_parameter: float = 2.0) -> float:
    """Bytes of the weights alone. Published figures are such products in GiB, printed as GB."""
    return n_parameters * bytes_per_parameter


def estimate_training(facts: ModelFacts, settings: TrainingSettings) -> TrainingEstimate:
    """Count a step. UnsupportedArchitectureError for models whose layers are not attention and a network."""
    if facts.is_recurrent:
        raise UnsupportedArchitectureError(f"{facts.name}: activations of recurrent layers are not known here")
    width = 2 if settings.mixed else 4
    trained = adapter_parameters(facts, settings.lora_rank) if settings.lora_rank else facts.n_parameters
    frozen = facts.n_parameters if settings.lora_rank else 0
    master = 4 if settings.mixed else 0
    return TrainingEstimate(
        facts=facts,
        settings=settings,
        weights_bytes=(trained + frozen) * width,
        gradients_bytes=trained * width,
        optimiser_bytes=trained * (8 + master),
        activations_bytes=activation_bytes(facts, settings),
        trained_parameters=trained,
    )


def adapter_parameters(facts: ModelFacts, rank: int) -> int:
    """Elements of LoRA's matrices: rank x (rows + columns) of every adapted projection."""
    total = 0
    for tensor in facts.tensors.values():
        part = tensor.name.removesuffix(".weight").rpartition(".")[2]
        if part in ADAPTED and len(tensor.shape) == 2:
            total += rank * sum(tensor.shape)
    return total


def activation_bytes(facts: ModelFacts, settings: TrainingSettings) -> int:
    """What the forward pass keeps for the way back.

    Each token keeps, in a layer: the stream before each norm, the normed and the scaled stream (6 hidden); queries,
    keys and values (these for every head), what attention gives, and the copy that its projection reads (5 queries);
    gate, its activation, up and their product (4 n_ff). The head keeps the last norm's three and the logits with their
    softmax and its gradient. With checkpointing a layer keeps its input alone, and one layer at a time has the rest.
    """
    width = 2 if settings.mixed else 4
    tokens = settings.batch * settings.sequence
    head_dim = max(layer.key_dim for layer in facts.layers)
    layer = 6 * facts.hidden + 5 * facts.n_head * head_dim + 4 * facts.n_ff
    if settings.lora_rank:
        layer += 4 * settings.lora_rank - 2 * facts.hidden  # frozen norms keep no normed stream
    layers = facts.n_layer * (facts.hidden if settings.checkpointing else layer)
    layers += layer if settings.checkpointing else 0
    head = tokens * (3 * facts.hidden * width + 3 * facts.n_vocab * 4)
    return tokens * layers * width + head
