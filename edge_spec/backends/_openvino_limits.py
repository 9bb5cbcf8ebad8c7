"""What the OpenVINO graph leaves out of the exports that the onnx backend runs."""

from __future__ import annotations

from edge_spec.errors import UnsupportedArchitectureError
from edge_spec.export.architecture import DecoderConfig


def check_expressible(config: DecoderConfig, name: str) -> None:
    """UnsupportedArchitectureError where the attention operator lacks something that the decoder has."""
    if config.attention_softcap:
        raise UnsupportedArchitectureError(
            f"the openvino backend does not run {name} ({config.architecture}): a soft cap on attention scores; "
            "the onnx backend runs it (--backend onnx)"
        )
