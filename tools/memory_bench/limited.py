"""Put this process under a limit, then become another command.

Run by `limits.py` as `python -m memory_bench.limited data BYTES COMMAND...` or `... cgroup FOLDER COMMAND...`.
"""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path


def main() -> None:
    """Set the limit and run the command in place of this one."""
    kind, what, *command = sys.argv[1:]
    if kind == "data":
        resource.setrlimit(resource.RLIMIT_DATA, (int(what), int(what)))
    else:
        (Path(what) / "cgroup.procs").write_text(str(os.getpid()))
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()
