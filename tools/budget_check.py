"""Does `ram=` hold? A long conversation of many turns at several budgets, each in a process of its own.

    python tools/budget_check.py 1.6GiB 2GiB 3GiB 4GiB

The peak of the process's anonymous memory, read every 5 ms from outside of the engine, must stay within the budget, and
each answer must end by itself: at its end, at its limit or at the window's, or for want of memory with a partial text.
Exits with 1 where one does not.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

MIB = 1 << 20
WORDS = [
    "river",
    "stone",
    "window",
    "garden",
    "paper",
    "bridge",
    "music",
    "letter",
    "winter",
    "orange",
    "silver",
    "market",
    "engine",
    "forest",
    "candle",
]


@dataclass
class Checked:
    """One conversation under one budget; bytes."""

    ram: str
    budget_bytes: int
    planned_bytes: int | None
    peak_anonymous_bytes: int
    peak_resident_bytes: int
    n_ctx: int
    draft: str | None
    turns: int
    tokens: int
    """Read and written over all turns, whatever the window dropped."""
    finish_reasons: list[str]
    notes: list[str]
    seconds: float

    @property
    def holds(self) -> bool:
        """Whether the promise was kept."""
        return self.peak_anonymous_bytes <= self.budget_bytes and "cancelled" not in self.finish_reasons


class Peak(threading.Thread):
    """The most anonymous memory that this process has held."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        from edge_spec.memory.process import process_memory

        self._memory = process_memory()
        self.n_bytes = 0

    def run(self) -> None:
        """Watch until the process ends."""
        while True:
            self.n_bytes = max(self.n_bytes, self._memory.read().anonymous_bytes)
            time.sleep(0.005)


def converse(
    ram: str, pair: str | None, target: str | None, *, backend: str, n_ctx: int | None, tokens: int
) -> Checked:
    """Talk until `tokens` were read and written."""
    from edge_spec import Engine

    peak, started = Peak(), time.perf_counter()
    peak.start()
    reasons: list[str] = []
    notes: list[str] = []
    done = 0
    with Engine.load(pair, target=target, ram=ram, backend=backend, n_ctx=n_ctx) as engine:
        chat = engine.chat()
        while done < tokens:
            result = chat.send(question(len(reasons)), max_tokens=24)
            done += engine.count(question(len(reasons))) + result.generated_tokens
            reasons.append(str(result.finish_reason))
            notes += [note for note in result.notes if note not in notes]
        info, n_ctx = engine.info, result.n_ctx
    return Checked(
        ram=ram,
        budget_bytes=info.budget_bytes or 0,
        planned_bytes=info.planned_bytes,
        peak_anonymous_bytes=peak.n_bytes,
        peak_resident_bytes=result.peak_rss_bytes,
        n_ctx=n_ctx,
        draft=info.draft,
        turns=len(reasons),
        tokens=done,
        finish_reasons=sorted(set(reasons)),
        notes=notes,
        seconds=time.perf_counter() - started,
    )


def question(number: int) -> str:
    """About 500 tokens that repeat little, and a question on them."""
    facts = [
        f"The {WORDS[i % 15]} number {number * 40 + i} lies beside the {WORDS[(i * 7 + number) % 15]}."
        for i in range(34)
    ]
    return f"{' '.join(facts)} What lies beside number {number * 40 + 3}? Answer in one sentence."


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ram", nargs="+", help="budgets, as --ram takes them")
    parser.add_argument("--pair", help="default: the default pair")
    parser.add_argument("--target", help="a target alone, instead of a pair")
    parser.add_argument("--backend", default="onnx", help="default: onnx")
    parser.add_argument("--ctx", type=int, help="window (default: the engine's)")
    parser.add_argument("--tokens", type=int, default=6000, help="length of the conversation")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        from edge_spec.errors import EdgeSpecError

        try:
            chosen = {"backend": options.backend, "n_ctx": options.ctx, "tokens": options.tokens}
            checked = converse(options.ram[0], options.pair, options.target, **chosen)
        except EdgeSpecError as exc:
            print(f"budget_check: {exc}", file=sys.stderr)
            return 1
        print(json.dumps(asdict(checked)))
        return 0
    named = {name: getattr(options, name) for name in ("pair", "target", "backend", "ctx", "tokens")}
    others = [part for name, value in named.items() if value is not None for part in (f"--{name}", str(value))]
    return max([run(ram, others) for ram in options.ram])


def run(ram: str, others: list[str]) -> int:
    """One budget in a process of its own; 1 where the promise was broken."""
    command = [sys.executable, str(Path(__file__)), ram, *others, "--child"]
    child = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if child.returncode:
        print(f"{ram}: ended with {child.returncode}")
        return 1
    checked = Checked(**json.loads(child.stdout))
    print(
        f"{ram}: {'holds' if checked.holds else 'BROKEN'}, budget {checked.budget_bytes // MIB} MiB, planned "
        f"{(checked.planned_bytes or 0) // MIB}, peak anonymous {checked.peak_anonymous_bytes // MIB}, resident "
        f"{checked.peak_resident_bytes // MIB}; window {checked.n_ctx}, draft {checked.draft}, {checked.turns} turns, "
        f"{checked.tokens} tokens, {', '.join(checked.finish_reasons)}, {checked.seconds:.0f} s"
    )
    for note in checked.notes:
        print(f"  {note}")
    return 0 if checked.holds else 1


if __name__ == "__main__":
    sys.exit(main())
