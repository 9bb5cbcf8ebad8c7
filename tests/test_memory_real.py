"""A small real model under a limit of the system's own: it runs, or refuses in our words, and is never killed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.real, pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA is Linux's")]

MIB = 1 << 20

SCRIPT = """
import resource, sys
resource.setrlimit(resource.RLIMIT_DATA, (int(sys.argv[1]), resource.RLIM_INFINITY))
from edge_spec import Engine
from edge_spec.errors import MemoryBudgetError
try:
    with Engine.load(target=sys.argv[2], backend="llama", threads=1) as engine:
        result = engine.generate("Count from one to five.", max_tokens=8)
        print("wrote", result.generated_tokens, result.finish_reason, engine.info.n_ctx)
except MemoryBudgetError as error:
    print("refused", error)
"""


@pytest.mark.parametrize(("limit_mib", "outcome"), [(2048, "wrote"), (170, "refused")])
def test_under_a_limit_on_data_it_runs_or_says_what_would(limit_mib: int, outcome: str, smollm2_path: Path) -> None:
    command = [sys.executable, "-c", SCRIPT, str(limit_mib * MIB), str(smollm2_path)]
    child = subprocess.run(command, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr
    assert child.stdout.startswith(outcome), child.stdout
    if outcome == "refused":
        assert "RLIMIT_DATA" in child.stdout
    else:
        assert child.stdout.split()[1] != "0"
