"""Mixtures of experts, latent attention, recurrent and hybrid models: what is counted is what llama.cpp allocates."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from edge_spec.memory import Settings, estimate, facts_of_gguf
from tests.tiny_layers import KINDS, write_layered_gguf

N_CTX = 512
LOG_STEP_BYTES = round(0.01 * 2**20)

SCRIPT = """
import json, sys
from memory_bench.heard import LlamaLog
log = LlamaLog()
from edge_spec.backends import llama
model = llama.load(__import__("pathlib").Path(sys.argv[1]), name="tiny", n_ctx=int(sys.argv[2]), threads=1)
logits = model.decode(list(range(40)), rows=1).logits
assert abs(logits).max() < 1e6
print(json.dumps(log.sums()))
"""


@pytest.mark.parametrize("architecture", sorted(KINDS))
def test_cache_state_and_weights_are_what_llama_cpp_says_that_it_allocated(architecture: str, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    path = write_layered_gguf(tmp_path / "tiny.gguf", architecture, tensor_type="Q4_K", n_vocab=1024)
    root = Path(__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(root), str(root / "tools")])}
    command = [sys.executable, "-c", SCRIPT, str(path), str(N_CTX)]
    child = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    told = json.loads(child.stdout)
    counted = estimate(facts_of_gguf(path), None, Settings(backend="llama", n_ctx=N_CTX, threads=1))
    parts = {part.name: part for part in counted.components}
    state = parts["recurrent state"].committed_bytes if "recurrent state" in parts else 0
    foretold = {
        "cache_bytes": parts["cache"].committed_bytes,
        "state_bytes": state,
        "mapped_weight_bytes": parts["weights"].mapped_bytes,
        "repacked_bytes": parts["weights"].committed_bytes,
    }
    for name, n_bytes in foretold.items():
        assert abs(told.get(name, 0) - n_bytes) <= LOG_STEP_BYTES, (name, told, foretold)
