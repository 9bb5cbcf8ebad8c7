"""Runs pip in a process of its own that ends when its parent does: `python -P pip_child.py PIP-ARGUMENTS`.

The parent holds the other end of this process's standard input and never writes to it. When the parent dies, however
it dies, the pipe ends, and so does this process. That needs no code between fork and exec (which is unsafe beside
threads), and works on every system; pip itself gets an empty standard input.
"""

from __future__ import annotations

import os
import runpy
import sys
import threading


def _end_with(parent: int) -> None:
    while os.read(parent, 1):
        pass
    os._exit(1)


def _main() -> None:
    parent = os.dup(0)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    sys.argv[0] = "pip"
    runpy.run_module("pip", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    _main()
