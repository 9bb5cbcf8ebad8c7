"""Runs code in a child process in which no file may grow past a size: a disk that is full in the middle of writing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

_LIMIT = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), int(sys.argv[1])))
from pathlib import Path
from edge_spec.errors import EdgeSpecError
try:
    {body}
except EdgeSpecError as error:
    print(type(error).__name__, error)
"""


def run_limited(limit: int, body: str, *paths: Path) -> str:
    """What went wrong in `body` (statements, `sys.argv[2:]` are the paths): the error's name and text, else nothing."""
    script = _LIMIT.format(body=body.strip().replace("\n", "\n    "))
    command = [sys.executable, "-c", script, str(limit), *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()
