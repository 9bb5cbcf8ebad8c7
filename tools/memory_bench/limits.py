"""The decisive test: a run under a limit of what was estimated, and under less."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from memory_bench.cell import Cell
from memory_bench.foretell import MIB, Foretold
from memory_bench.measure import Measured, measure

SHARES = (1.0, 0.85, 0.6)
"""Of the estimate and its band."""
_KERNEL_BYTES = 4 * MIB
"""What a control group counts besides: page tables and the like, 1 MiB for a small model before anything is loaded."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a cell ended under a limit of `limit_bytes`, of a `kind`: "RLIMIT_DATA" or "cgroup"."""

    cell: Cell
    kind: str
    share: float
    limit_bytes: int
    measured: Measured

    @property
    def word(self) -> str:
        """`finished` as asked; `degraded`: with less, and saying so; `refused` by a typed error; `killed` by a signal;
        `crashed` with a traceback, or an error that is not ours."""
        facts = self.measured.facts
        if self.measured.exit_code < 0:
            return "killed"
        if facts.get("stage") == "refused":
            return "refused"
        if self.measured.exit_code or facts.get("stage") != "generated":
            return "crashed"
        as_asked = facts["n_ctx"] == self.cell.n_ctx and bool(facts["draft"]) == bool(self.cell.draft)
        return "finished" if as_asked and facts["finish_reason"] != "memory" else "degraded"

    @property
    def good(self) -> bool:
        """With all that was estimated a run finishes as asked; with less it may degrade or be refused."""
        return self.word == "finished" or (self.share < 1 and self.word in ("degraded", "refused"))

    @property
    def said(self) -> str:
        """The error, or why the text ended and what was given up."""
        facts = self.measured.facts
        if self.word == "refused":
            return f"{facts['error']}: {facts['message']}"
        if self.word in ("killed", "crashed"):
            return f"exit code {self.measured.exit_code}; {self.measured.error[-300:]}"
        return "; ".join([f"{facts['generated_tokens']} tokens, {facts['finish_reason']}", *facts["notes"]])


def run_limited(cell: Cell, foretold: Foretold) -> Iterator[Outcome]:
    """A cell under each kind of limit that this machine allows, with the whole of what was estimated and with less.

    RLIMIT_DATA counts what is allocated and never touched, so what is reserved is added there. A control group counts
    what is resident, and the page cache, which gives way.
    """
    estimate = foretold.estimate.at(lookup=True)  # the plan counts it, whatever the drafter
    held = estimate.peak_bytes + estimate.band_bytes
    for share in SHARES:
        limit = round(share * (held + estimate.reserved_bytes))
        prefix = [sys.executable, "-m", "memory_bench.limited", "data", str(limit)]
        yield Outcome(cell, "RLIMIT_DATA", share, limit, measure(cell, prefix=prefix))
    for share in SHARES:
        limit = round(share * (held + _KERNEL_BYTES))
        with control_group(limit) as folder:
            if folder is None:
                return
            prefix = [sys.executable, "-m", "memory_bench.limited", "cgroup", str(folder)]
            yield Outcome(cell, "cgroup", share, limit, measure(cell, prefix=prefix))


@contextmanager
def control_group(limit_bytes: int) -> Iterator[Path | None]:
    """A control group with a limit below this process's own, gone at the end; None where none can be made."""
    folder = None
    try:
        for parent, limit_file in _own_groups():
            folder = parent / f"memory-grid-{os.getpid()}"
            try:
                folder.mkdir()
                (folder / limit_file).write_text(str(limit_bytes))
                break
            except OSError:
                _remove(folder)
                folder = None
        yield folder
    finally:
        if folder is not None:
            _remove(folder)


def _own_groups() -> Iterator[tuple[Path, str]]:
    """Folders of this process's control groups that may limit memory, with the name of the file for it."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            yield Path("/sys/fs/cgroup/memory") / path.lstrip("/"), "memory.limit_in_bytes"
        elif not controllers:
            yield Path("/sys/fs/cgroup") / path.lstrip("/"), "memory.max"


def _remove(folder: Path) -> None:
    try:
        folder.rmdir()
    except OSError as exc:
        if folder.exists():
            print(f"memory_grid: {folder} stays behind: {exc}", file=sys.stderr)


def as_text(outcomes: Sequence[Outcome]) -> str:
    """A line for each run, and the count of those that ended as they should."""
    lines = [
        f"{'ok ' if outcome.good else 'BAD'} {outcome.cell.name}, {outcome.kind} {outcome.limit_bytes / MIB:.0f} MiB "
        f"({outcome.share:.2f}): {outcome.word}. {outcome.said}"
        for outcome in outcomes
    ]
    return "\n".join([*lines, "", f"{sum(o.good for o in outcomes)} of {len(outcomes)} ended as they should"])


def as_json(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Everything, for other programs."""
    return {
        "outcomes": [
            asdict(replace(outcome, measured=Measured()))
            | {
                "word": outcome.word,
                "good": outcome.good,
                "said": outcome.said,
                "peak_anonymous_bytes": outcome.measured.peak_anonymous_bytes,
                "facts": outcome.measured.facts,
            }
            for outcome in outcomes
        ]
    }
