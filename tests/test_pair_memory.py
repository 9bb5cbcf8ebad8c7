"""The default target's export, loaded: little more memory than its weights and its cache."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.pair, pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")]

N_CTX = 2048

SCRIPT = """
import json, sys
from edge_spec.backends._onnx_session import import_library
from edge_spec.backends.onnx import OnnxModel
from edge_spec.export.exporter import ensure_export
from edge_spec.export.recipe import RECIPES
from edge_spec.memory.process import process_memory
from edge_spec.store import Store
import_library()
memory, store = process_memory(), Store()
before = memory.read().resident_bytes
local = store.resolve(sys.argv[1])
export = ensure_export(local.path, local.sha256, RECIPES["int4"], store.exports_dir)
model = OnnxModel(export, name="target", n_ctx=int(sys.argv[2]), threads=1)
model.decode(list(range(16)), rows=4)
cache = [array for _, array in model._cache.arrays()]
for array in cache:
    array[:] = 0  # as a full window would have them
held = memory.read().resident_bytes - before
print(json.dumps([held, model.spec.weight_bytes, sum(array.nbytes for array in cache)]))
"""


def test_a_loaded_target_holds_at_most_115_percent_of_its_weights_and_cache(target_path: Path) -> None:
    command = [sys.executable, "-c", SCRIPT, str(target_path), str(N_CTX)]
    child = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    held, weights, cache = json.loads(child.stdout)
    assert held <= 1.15 * (weights + cache), (held, weights, cache)
