"""ONNX Runtime is imported in one way: told not to report to its makers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = "from edge_spec.backends._onnx_session import import_library; import_library()"
LIBRARY = "import os; print(os.environ.get('ORT_DISABLE_TELEMETRY'))"


@pytest.mark.parametrize(("set_by_user", "seen"), [(None, "1"), ("0", "0")])
def test_telemetry_is_off_before_the_library_is_imported_unless_the_user_wants_it(
    tmp_path: Path, set_by_user: str | None, seen: str
) -> None:
    (tmp_path / "onnxruntime.py").write_text(LIBRARY)
    environment = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[1])])
    if set_by_user is not None:
        environment["ORT_DISABLE_TELEMETRY"] = set_by_user
    child = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=environment, check=True)
    assert child.stdout.strip() == seen


def test_no_other_module_imports_the_library() -> None:
    package = Path(__file__).parents[1] / "edge_spec"
    importing = [path.name for path in package.rglob("*.py") if "import onnxruntime" in path.read_text("utf-8")]
    assert sorted(importing) == ["_onnx_session.py"]
