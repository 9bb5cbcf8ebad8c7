"""A contender's process. Run by `process.py` as `python -m peer_bench.worker CONTENDER SETTINGS`."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from edge_spec.worker_process import serve
from peer_bench.answer import Settings
from peer_bench.contenders import CONTENDERS


def main() -> None:
    """Load the contender that the command line names, then answer."""
    serve(_start)


def _start() -> tuple[dict[str, Any], Callable[..., dict[str, Any]]]:
    started = time.perf_counter()
    contender = CONTENDERS[sys.argv[1]](Settings(**json.loads(sys.argv[2])))
    greeting = {"load_s": time.perf_counter() - started, "about": contender.about}
    return greeting, lambda **request: asdict(contender.answer(**request))


if __name__ == "__main__":
    main()
