"""llama.cpp's own server and its ways of speculating: a draft model, n-grams of the context.

The server is a program that the user built; it runs as a child on the loopback interface, with one slot. Times are the
server's own, which leave HTTP out.
"""

from __future__ import annotations

import atexit
import json
import socket
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peer_bench.answer import Answer, Settings
from peer_bench.prompts import Reading

_LOADS_WITHIN_S = 120.0
_DRAFTED = 3
"""Tokens that the draft model proposes: the length that facts about this pair call llama.cpp's best on a CPU."""


@dataclass(frozen=True, slots=True)
class Mode:
    """How the server is run: `file_type` that the target is stored as (None: as it was published), its options."""

    file_type: str | None = None
    draft: bool = False
    options: tuple[str, ...] = ()


MODES = {
    "plain": Mode(),
    "draft": Mode(draft=True, options=("--spec-type", "draft-simple", "--spec-draft-n-max", str(_DRAFTED))),
    "ngram": Mode(options=("--spec-type", "ngram-simple")),
    "q4_0": Mode(file_type="Q4_0"),
    "q4_0-ngram": Mode(file_type="Q4_0", options=("--spec-type", "ngram-simple")),
}


class LlamaCppServer:
    """The pair's target in one of `MODES`, reading the very ids that our engine reads."""

    def __init__(self, settings: Settings, mode: str) -> None:
        from edge_spec.store import Store

        if settings.llama_server is None:
            raise ValueError("name llama.cpp's server program: --llama-server PROGRAM")
        chosen, store = MODES[mode], Store()
        pair = store.pair(settings.pair)
        published = store.resolve(pair.target).path
        self._reading = Reading(published, pair.system)
        target = published if chosen.file_type is None else _requantized(published, chosen.file_type, store.cache_dir)
        options = ["-m", str(target), "-c", str(settings.n_ctx), *chosen.options]
        if chosen.draft:
            if pair.draft is None:
                raise ValueError(f"the pair {settings.pair} has no draft")
            options += ["-md", str(store.resolve(pair.draft).path)]
        self._url = _start(settings.llama_server, options, settings.threads)
        self.about = f"llama-server, {target.name}, {' '.join(chosen.options) or 'no speculation'}"

    def answer(self, prompt: str, max_tokens: int) -> Answer:
        """See `Contender`."""
        ids = self._reading.ids(prompt)
        asked = {
            "prompt": ids,
            "n_predict": max_tokens,
            "temperature": 0,
            "cache_prompt": False,
            "return_tokens": True,
        }
        started = time.perf_counter()
        told = _post(f"{self._url}/completion", asked)
        wall_s = time.perf_counter() - started
        times, tokens = told["timings"], [int(token) for token in told["tokens"]]
        accepted = int(times.get("draft_n_accepted", 0))
        return Answer(
            token_ids=tokens,
            text=told["content"],
            prompt_tokens=len(ids),
            ttft_s=times["prompt_ms"] / 1e3,
            decode_s=times["predicted_ms"] / 1e3,
            wall_s=wall_s,
            steps=max(1, len(tokens) - 1 - accepted),
            drafted=int(times.get("draft_n", 0)),
            accepted=accepted,
        )


def _requantized(source: Path, file_type: str, folder: Path) -> Path:
    """`source` as a file of another type, made once."""
    from edge_spec.export.requantize import requantize

    out = folder / "peers" / f"{source.stem}.{file_type}.gguf"
    if not out.exists():
        requantize(source, out, file_type)
    return out


def _start(program: str, options: list[str], threads: int) -> str:
    """Start the server and wait until its model is loaded; its address. It ends with this process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [program, *options, "-t", str(threads), "-np", "1", "--host", "127.0.0.1", "--port", str(port)]
    server = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=sys.stderr)
    atexit.register(_end, server)
    url, until = f"http://127.0.0.1:{port}", time.monotonic() + _LOADS_WITHIN_S
    while time.monotonic() < until:
        if server.poll() is not None:
            raise RuntimeError(f"{program} ended while it was loading (exit code {server.returncode})")
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return url
        except OSError:  # not yet
            time.sleep(0.2)
    raise RuntimeError(f"{program} did not load its model within {_LOADS_WITHIN_S:.0f} s")


def _end(server: subprocess.Popen[bytes]) -> None:
    server.terminate()
    server.wait()


def _post(url: str, body: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as reply:
        told: dict[str, Any] = json.load(reply)
    return told
