"""The estimate of fine-tuning, against a real step."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from edge_spec.memory import facts_of_gguf
from edge_spec.memory.training import TrainingSettings, adapter_parameters, estimate_training
from tests.tiny_models import write_tiny_gguf

TOOL = Path(__file__).parents[1] / "tools" / "training_step.py"


@pytest.mark.parametrize("options", [[], ["--checkpointing"]], ids=["kept", "computed-again"])
def test_a_real_step_takes_what_was_estimated(options: list[str]) -> None:
    pytest.importorskip("torch", reason="a real training step needs torch: pip install 'edge-spec[export]'")
    size = ["--hidden", "512", "--heads", "8", "--layers", "4", "--vocab", "8192", "--sequence", "128"]

    done = subprocess.run([sys.executable, str(TOOL), *size, *options], capture_output=True, text=True, check=True)

    told = json.loads(done.stdout)
    assert told["estimated_bytes"] == pytest.approx(told["measured_bytes"], rel=0.15)


def test_lora_trains_two_thin_matrices_beside_each_projection_of_attention(tmp_path: Path) -> None:
    facts = facts_of_gguf(write_tiny_gguf(tmp_path / "m.gguf", hidden=256, n_head=4, n_kv_head=2, n_layer=2))
    queries, keys = 256, 128
    per_layer = 2 * (256 + queries) + 2 * (256 + keys)  # queries and output, keys and values

    lora = estimate_training(facts, TrainingSettings(lora_rank=8))
    full = estimate_training(facts, TrainingSettings())

    assert adapter_parameters(facts, 8) == lora.trained_parameters == 2 * 8 * per_layer
    assert lora.gradients_bytes == 4 * lora.trained_parameters
    assert full.weights_bytes + full.gradients_bytes + full.optimiser_bytes == 16 * facts.n_parameters
    assert lora.total_bytes < full.total_bytes


def test_checkpointing_keeps_less(tmp_path: Path) -> None:
    facts = facts_of_gguf(write_tiny_gguf(tmp_path / "m.gguf", n_layer=8))

    kept = estimate_training(facts, TrainingSettings())
    again = estimate_training(facts, TrainingSettings(checkpointing=True))

    assert again.activations_bytes < kept.activations_bytes
    assert again.optimiser_bytes == kept.optimiser_bytes
