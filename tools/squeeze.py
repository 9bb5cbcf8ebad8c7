"""Down the ladder in the middle of an answer: the process is told to hold less and less, and says what it gave up.

    python tools/squeeze.py                          # the default pair
    python tools/squeeze.py --backend llama --ctx 2048

A conversation fills most of its window. While the next answer is written, the budget is lowered to what the process
holds, again each time that it has settled, until the answer ends for want of memory. One line a measure, with the
anonymous memory before and after it. Exits with 1 unless the draft model went first, then context and cache, in turns,
and the answer ended with finish_reason "memory" and a part of its text.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from budget_check import question

from edge_spec import Engine, FinishReason
from edge_spec.memory.process import process_memory
from edge_spec.types import GenerationResult

MIB = 1 << 20
EVERY = 4
"""Tokens between two lowerings of the budget."""


@dataclass(frozen=True, slots=True)
class Seen:
    """The process when so many tokens of the answer were written."""

    tokens: int
    measures: int
    anonymous_bytes: int


def squeeze(engine: Engine, *, fill: float) -> tuple[GenerationResult, list[Seen]]:
    """Fill the window to this share, then answer under a budget that falls."""
    memory, chat = process_memory(), engine.chat()
    turn = 0
    while len(chat.prompt(question(turn), max_tokens=16).ids) < fill * engine.spec.n_ctx:
        chat.send(question(turn), max_tokens=16)
        turn += 1
    seen: list[Seen] = []
    stream = chat.stream(f"{question(turn)} Then tell a long story about it.", max_tokens=400, drafter="model")
    for _ in stream:
        held = memory.read().anonymous_bytes
        seen.append(Seen(len(stream.token_ids), len(engine.measures), held))
        if len(stream.token_ids) % EVERY == 0 or len(seen) % EVERY == 0:
            engine.limit_memory(held)
    return stream.result, seen


def is_right(result: GenerationResult) -> bool:
    """Whether the ladder was gone down in order, and the answer ended with a part of its text."""
    kinds = [_kind(measure) for measure in result.measures]
    first = kinds[: 3 if result.draft else 2]
    expected = ["draft", "context", "window"] if result.draft else ["context", "window"]
    return first == expected and result.finish_reason is FinishReason.MEMORY and bool(result.text)


def _kind(measure: str) -> str:
    return next(kind for kind in ("draft", "context", "window") if kind in measure)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", help="default: the default pair")
    parser.add_argument("--target")
    parser.add_argument("--draft")
    parser.add_argument("--backend", default="onnx")
    parser.add_argument("--ctx", type=int, default=2048)
    parser.add_argument("--fill", type=float, default=0.7, help="share of the window that the conversation fills")
    options = parser.parse_args(arguments)
    with Engine.load(
        options.pair, target=options.target, draft=options.draft, backend=options.backend, n_ctx=options.ctx
    ) as engine:
        result, seen = squeeze(engine, fill=options.fill)
    for number, measure in enumerate(result.measures):
        before = [one for one in seen if one.measures <= number]
        after = [one for one in seen if one.measures == number + 1]
        held = [f"{one[i].anonymous_bytes // MIB} MiB" if one else "?" for one, i in ((before, -1), (after, 0))]
        at = f"after {before[-1].tokens} tokens" if before else "at once"
        print(f"{at}: {measure}; anonymous memory {held[0]} -> {held[1]}")
    print(f"finish_reason {result.finish_reason}, {result.generated_tokens} tokens: {result.text[:60]!r} ...")
    for note in result.notes:
        print(f"  {note}")
    return 0 if is_right(result) else 1


if __name__ == "__main__":
    sys.exit(main())
