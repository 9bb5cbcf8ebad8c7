"""What `edge-spec estimate` says: a table for people, an object for programs."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

from edge_spec.memory.estimate import Estimate
from edge_spec.memory.levers import Lever
from edge_spec.memory.speed import Speed
from edge_spec.sizes import format_size

_WIDTH = 110


@dataclass(frozen=True)
class Report:
    """An estimate against a budget. `largest_n_ctx` is None where no context fits; `levers` come largest first.

    `room_bytes`: memory that mapped files may stay in together with what is committed, at least the budget.
    """

    counted: Estimate
    budget_bytes: int
    room_bytes: int
    largest_n_ctx: int | None
    levers: list[Lever]
    speed: Speed

    @property
    def fits(self) -> bool:
        """Whether the run stays within the budget, band included."""
        return self.counted.fits(self.budget_bytes)

    @property
    def working_set_fits(self) -> bool:
        """Whether all that a token reads stays in memory."""
        return self.counted.working_set_bytes <= self.room_bytes

    @property
    def verdict(self) -> str:
        """One sentence: whether it fits, the longest context that does, and the smallest change that would help."""
        counted, budget = self.counted, format_size(self.budget_bytes)
        needed = counted.peak_bytes + counted.band_bytes
        needs = (
            f"{format_size(needed)} ({format_size(counted.peak_bytes)} and a band of {format_size(counted.band_bytes)})"
        )
        longest = "no context would fit"
        if self.largest_n_ctx:
            longest = f"the longest context that fits is {self.largest_n_ctx} tokens"
        if self.fits and self.working_set_fits:
            return f"fits: {needs} of {budget}; {longest}"
        if self.fits:
            read, room = format_size(counted.working_set_bytes), format_size(self.room_bytes)
            return (
                f"fits: {needs} of {budget}, but every token reads {read} and {room} of that stay in memory: the rest "
                f"comes from the disk each time; {longest}"
            )
        short = f"does not fit: {needs}, {format_size(needed - self.budget_bytes)} more than {budget}; {longest}"
        helping = [
            lever
            for lever in self.levers
            if lever.outcome.fits(self.budget_bytes) and lever.outcome.working_set_bytes <= self.room_bytes
        ]
        if not helping:
            return f"{short}; no single change is enough"
        return f"{short}; enough would be {helping[-1].name} ({helping[-1].option})"

    def to_json(self) -> dict[str, Any]:
        """Plain values; sizes in bytes."""
        counted = self.counted
        return {
            "fits": self.fits,
            "working_set_fits": self.working_set_fits,
            "verdict": self.verdict,
            "budget_bytes": self.budget_bytes,
            "backend": counted.settings.backend,
            "draft_backend": counted.settings.backend_of_draft if counted.draft is not None else None,
            "n_ctx": counted.settings.n_ctx,
            "committed_bytes": counted.committed_bytes,
            "working_set_bytes": counted.working_set_bytes,
            "load_peak_bytes": counted.load_peak_bytes,
            "reserved_bytes": counted.reserved_bytes,
            "band_bytes": counted.band_bytes,
            "largest_n_ctx": self.largest_n_ctx,
            "components": [
                {
                    "owner": part.owner.value,
                    "name": part.name,
                    "committed_bytes": part.committed_bytes,
                    "mapped_bytes": part.mapped_bytes,
                    "working_set_bytes": part.committed_bytes + part.touched_bytes,
                    "load_peak_bytes": part.load_bytes,
                    "source": part.source.value,
                }
                for part in counted.components
            ],
            "levers": [
                {
                    "name": lever.name,
                    "option": lever.option,
                    "saved_bytes": lever.saved_bytes,
                    "fits": lever.outcome.fits(self.budget_bytes),
                }
                for lever in self.levers
            ],
            "tokens_per_s": round(self.speed.tokens_per_s, 2),
            "tokens_per_s_source": self._speed_source,
        }

    def print(self) -> None:
        """Print the parts, the speed, what would make it smaller, and the verdict to standard output."""
        self._print_parts()
        print(f"{self.speed.tokens_per_s:.1f} tokens/s without drafts (from {self._speed_source})")
        for lever in self.levers:
            print(f"{lever.name} ({lever.option}): {format_size(lever.saved_bytes)} less")
        print(self.verdict)

    @property
    def _speed_source(self) -> str:
        return self.speed.source + ("" if self.working_set_fits else ", were all of it in memory")

    def _print_parts(self) -> None:
        from rich.console import Console
        from rich.table import Table

        counted, settings = self.counted, self.counted.settings
        title = counted.target.name + (f" + {counted.draft.name}" if counted.draft else "")
        table = Table(title=f"{title} · {settings.backend} · {settings.n_ctx} tokens", title_justify="left", box=None)
        for name in ("OWNER", "PART"):
            table.add_column(name)
        for name in ("COMMITTED", "MAPPED", "WORKING SET"):
            table.add_column(name, justify="right")
        table.add_column("FROM")
        for part in counted.components:
            sizes = (part.committed_bytes, part.mapped_bytes, part.committed_bytes + part.touched_bytes)
            shown = (format_size(size) if size else "-" for size in sizes)
            table.add_row(part.owner.value, part.name, *shown, part.source.value)
        table.add_section()
        mapped = sum(part.mapped_bytes for part in counted.components)
        totals = (counted.committed_bytes, mapped, counted.working_set_bytes)
        table.add_row("all", "full context", *map(format_size, totals))
        table.add_row("all", "peak of loading", format_size(counted.load_peak_bytes))
        width = None if sys.stdout.isatty() else _WIDTH
        Console(file=sys.stdout, width=width, highlight=False).print(table)
