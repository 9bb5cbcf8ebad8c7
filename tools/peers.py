"""Compare edge_spec with its peers on one machine, in one run.

    python tools/peers.py --workload prompts.jsonl --tasks code --limit 12 --max-tokens 128 --threads 2

Every contender is a process of its own that keeps its models loaded. They answer in turn, prompt by prompt (A B C,
then B C A, ...), so that a machine that slows down slows all of them; only one works at a time, the others wait on a
pipe. Every prompt is read from an empty cache, under the same chat template, greedily.

The llama-server contenders run llama.cpp's own server, which llama-cpp-python's source package builds:

    cmake -S vendor/llama.cpp -B build -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_UI=OFF
    cmake --build build --target llama-server

The genai contenders run onnxruntime-genai (`pip install onnxruntime-genai`) on the very exports of ours; the graph that
it wants is made of them in the cache folder, and goes with the process.

Decode tokens/s is (generated - 1) / (time from the first token to the last). The first contender is the one that the
others are compared with.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

from peer_bench.answer import Answer, Settings
from peer_bench.contenders import CONTENDERS, DEFAULT
from peer_bench.process import ContenderError, ContenderProcess
from peer_bench.prompts import Prompt, read_workload
from peer_bench.report import as_json, as_text

_WARM_UP = "Say hello."
_SETTLE_S = 0.05  # threads of the last contender's pool stop spinning within milliseconds


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the comparison; 0 if every contender answered every prompt, 1 if one failed, 2 for bad usage."""
    options = _parser().parse_args(arguments)
    try:
        prompts = read_workload(options.workload, options.tasks, options.limit)
    except (OSError, ValueError) as exc:
        print(f"peers: {exc}", file=sys.stderr)
        return 2
    settings = Settings(
        pair=options.pair, threads=options.threads, n_ctx=options.ctx, llama_server=options.llama_server
    )
    try:
        with ExitStack() as stack:
            processes = []
            for name in options.contenders:
                _note(f"loading {name}")
                processes.append(stack.enter_context(closing(ContenderProcess(name, settings))))
            answers = _run(processes, prompts, options.max_tokens, options.block)
    except ContenderError as exc:
        print(f"peers: {exc}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    about = {process.name: _describe(process) for process in processes}
    if options.json:
        run = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
        print(json.dumps({"run": run, **as_json(answers, prompts, about)}, indent=1))
    else:
        print(as_text(answers, prompts, about))
    return 0


def _run(
    processes: Sequence[ContenderProcess], prompts: Sequence[Prompt], max_tokens: int, block: int
) -> dict[str, dict[str, Answer]]:
    """All answers, by contender and prompt id."""
    for process in processes:
        process.answer(_WARM_UP, 8)  # pages of the weights are read in, buffers are made
    answers: dict[str, dict[str, Answer]] = {process.name: {} for process in processes}
    for turn, start in enumerate(range(0, len(prompts), block)):
        first = turn % len(processes)
        for process in (*processes[first:], *processes[:first]):
            for prompt in prompts[start : start + block]:
                time.sleep(_SETTLE_S)
                answers[process.name][prompt.id] = process.answer(prompt.text, max_tokens)
        _note(f"{min(start + block, len(prompts))}/{len(prompts)} prompts")
    return answers


def _describe(process: ContenderProcess) -> dict[str, Any]:
    return {
        "about": process.about,
        "load_s": process.load_s,
        "peak_loading": asdict(process.peak_loading),
        "peak_answering": asdict(process.peak_answering),
    }


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    summary, _, _ = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(prog="peers", description=summary)
    parser.add_argument("--workload", type=Path, required=True, help="JSON lines with id, task and prompt")
    parser.add_argument("--tasks", type=lambda text: text.split(","), default=[], help="comma-separated; default all")
    parser.add_argument("--limit", type=_positive, help="at most so many prompts of each task")
    parser.add_argument("--max-tokens", type=_positive, default=128)
    parser.add_argument("--threads", type=_positive, default=2)
    parser.add_argument("--ctx", type=_positive, default=4096, help="window in tokens, the same for all")
    parser.add_argument("--pair", default="qwen2.5-coder")
    parser.add_argument("--block", type=_positive, default=1, help="prompts that a contender answers in one turn")
    parser.add_argument(
        "--contenders",
        type=_contenders,
        default=list(DEFAULT),
        help=f"comma-separated, the reference first; of: {', '.join(CONTENDERS)} (default: {', '.join(DEFAULT)})",
    )
    parser.add_argument("--llama-server", metavar="PROGRAM", help="llama.cpp's server, for the llama-server contenders")
    parser.add_argument("--json", action="store_true", help="one object on standard output, every answer included")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return value


def _contenders(text: str) -> list[str]:
    names = text.split(",")
    unknown = [name for name in names if name not in CONTENDERS]
    if unknown:
        raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; there are {', '.join(CONTENDERS)}")
    if len(set(names)) < len(names):
        raise argparse.ArgumentTypeError("a contender is named twice")
    return names


if __name__ == "__main__":
    sys.exit(main())
