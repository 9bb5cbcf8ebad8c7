"""What the OpenVINO graph leaves out of the exports that the onnx backend runs."""

from __future__ import annotations

from edge_spec.errors import UnsupportedArchitectureError
from edge_spec.export.architecture import DecoderConfig


def check_expressible(config: DecoderConfig, name: str, n_ctx: int) -> None:
    """UnsupportedArchitectureError, which names each part of the decoder that the graph has no operators for.

    A window that holds all of the `n_ctx` tokens is none.
    """
    traits = config.traits
    parts: dict[str, object] = {
        f"attention windows of fewer than {n_ctx} tokens": any(0 < window < n_ctx for window in config.windows),
        "a soft cap on attention scores": config.attention_softcap,
        "a soft cap on logits": config.logit_softcap,
        "a scale of attention scores of its own": config.attention_scale,
        "norms of queries and keys": traits.qk_norm,
        "norms behind the branches": traits.post_norms,
        "scaled embeddings": config.embedding_scale != 1,
        f"the activation {traits.activation}": traits.activation != "silu",
        "fused gate and up projections": traits.fused_inputs,
        "layers with another rotary embedding, or none": config.rope_names != ["cos", "sin"] or traits.unrotated_every,
        "a magnitude of the rotary embedding": config.rope_magnitude != 1,
        "a rotary embedding that depends on the window": config.rope_long_factors is not None,
    }
    missing = [part for part, present in parts.items() if present]
    if missing:
        raise UnsupportedArchitectureError(
            f"the openvino backend does not run {name} ({config.architecture}): {', '.join(missing)}; "
            "the onnx backend runs it (--backend onnx)"
        )
