"""Hugging Face checkpoints: folders of config.json, safetensors and a tokenizer."""

from edge_spec.checkpoint.folder import Checkpoint, is_checkpoint, open_checkpoint

__all__ = ["Checkpoint", "is_checkpoint", "open_checkpoint"]
