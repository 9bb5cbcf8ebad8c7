"""A contender's process: requests come as JSON lines on standard input, replies go out on what was standard output.

Run by `process.py` as `python -m peer_bench.worker CONTENDER SETTINGS`. It ends when its input does, so it does not
outlive the benchmark.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import asdict
from typing import Any, TextIO

from peer_bench.answer import Settings
from peer_bench.contenders import CONTENDERS


def main() -> None:
    """Load, say so, then answer one request after the other."""
    replies = _private_output()
    started = time.perf_counter()
    try:
        contender = CONTENDERS[sys.argv[1]](Settings(**json.loads(sys.argv[2])))
    except Exception as exc:
        _send(replies, {"error": f"{type(exc).__name__}: {exc}"})
        return
    _send(replies, {"load_s": time.perf_counter() - started, "about": contender.about})
    for line in sys.stdin:
        try:
            reply = asdict(contender.answer(**json.loads(line)))
        except Exception as exc:
            reply = {"error": f"{type(exc).__name__}: {exc}"}
        _send(replies, reply)


def _private_output() -> TextIO:
    """The pipe to the benchmark, out of reach of libraries that print: their output goes to standard error."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return replies


def _send(replies: TextIO, message: dict[str, Any]) -> None:
    replies.write(json.dumps(message) + "\n")
    replies.flush()


if __name__ == "__main__":
    main()
