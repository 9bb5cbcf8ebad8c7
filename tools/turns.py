"""Two chats in turn on one engine: how long each waits for its first token, parked and read again.

    python tools/turns.py                                  # the default pair
    python tools/turns.py --backend openvino --tokens 1000 --parked 512MiB

Both chats have a system prompt in common and read a text of their own in their first turn; then they take turns. The
first line is without parking, the second with it: tokens of a prompt, the median of the seconds to the first token of
the later turns, and what the process holds at the end. Exits with 1 unless all the texts are the same; llama.cpp's may
differ in a near tie, since what it reads again it reads in other passes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from statistics import median

from edge_spec import Engine
from edge_spec.memory.process import process_memory
from edge_spec.sizes import format_size

SYSTEM = "You answer in one short sentence, and only from the text that you were given. " * 10
SUBJECTS = ("the harbour", "the archive")


def long_text(engine: Engine, subject: str, tokens: int) -> str:
    """A text about `subject` of so many tokens or a few more."""
    lines: list[str] = []
    while engine.count("\n".join(lines)) < tokens:
        lines.append(f"On day {len(lines)} {len(lines) * 7 % 31} people came to {subject}.")
    return "\n".join(lines)


def take_turns(engine: Engine, *, tokens: int, turns: int) -> tuple[list[list[int]], list[float], int]:
    """The answers as ids, seconds to the first tokens behind the first turns, and tokens of the last prompt."""
    chats = [engine.chat(system=SYSTEM) for _ in SUBJECTS]
    texts, waited, length = [], [], 0
    for turn in range(turns):
        for chat, subject in zip(chats, SUBJECTS, strict=True):
            asked = f"How many came to {subject} on day {turn}?"
            said = chat.send(f"{long_text(engine, subject, tokens)}\n{asked}" if turn == 0 else asked, max_tokens=16)
            texts.append(said.token_ids)
            length = said.prompt_tokens
            if turn > 0:
                waited.append(said.ttft_s)
    return texts, waited, length


def main(argv: Sequence[str] | None = None) -> int:
    """Run it both ways; 1 if the texts differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", help="a model of your own; the default pair without it")
    parser.add_argument("--draft")
    parser.add_argument("--backend", default="onnx")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--tokens", type=int, default=1000, help="of each chat's own text")
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--parked", default="256MiB")
    options = parser.parse_args(argv)
    written = []
    for parked in (0, options.parked):
        with Engine.load(
            target=options.target,
            draft=options.draft,
            backend=options.backend,
            threads=options.threads,
            parked=parked,
        ) as engine:
            texts, waited, length = take_turns(engine, tokens=options.tokens, turns=options.turns)
            held = format_size(process_memory().read().anonymous_bytes)
            seconds = f"{median(waited):.2f} s ({min(waited):.2f} to {max(waited):.2f})"
            print(f"parked {parked}: {length} tokens, first token after {seconds}, {held} held", flush=True)
            written.append(texts)
    same = written[0] == written[1]
    print("the texts are the same" if same else "the texts differ")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
