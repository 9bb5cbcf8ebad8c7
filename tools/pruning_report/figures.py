"""A report that is written row by row, and gone on with where it ended."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from time import monotonic
from typing import Any


class Figures:
    """Rows of figures by section and name, kept in a file as soon as they are there."""

    def __init__(self, file: Path | None, setup: dict[str, Any], minutes: float | None) -> None:
        """`setup`: what the figures are of. `minutes`: time after which no further row is begun.

        Raises ValueError for a file whose figures are of something else.
        """
        self._file = file
        self._until = monotonic() + 60 * minutes if minutes else float("inf")
        self.report: dict[str, Any] = {"setup": setup, "sections": {}}
        self.num_left = 0
        """Rows that time did not suffice for."""
        if file is not None and file.exists():
            kept = json.loads(file.read_text("utf-8"))
            if kept.get("setup") != setup:
                raise ValueError(f"{file} has figures of {kept.get('setup')}, not of {setup}: name another file")
            self.report = kept

    def row(self, section: str, name: str) -> dict[str, Any] | None:
        """A row that is there already."""
        row = self.report["sections"].get(section, {}).get(name)
        assert row is None or isinstance(row, dict)
        return row

    def may_begin(self) -> bool:
        """Whether there is time for one more row; else it counts as left."""
        if monotonic() < self._until:
            return True
        self.num_left += 1
        return False

    def put(self, section: str, name: str, row: dict[str, Any]) -> None:
        """Keep a row."""
        self.report["sections"].setdefault(section, {})[name] = row
        if self._file is not None:
            partial = self._file.with_suffix(".part")
            partial.write_text(json.dumps(self.report, indent=1) + "\n", "utf-8")
            partial.replace(self._file)


def table(report: dict[str, Any]) -> str:
    """Every section with rows of policies, as one Markdown table each."""
    lines = []
    for section, rows in report["sections"].items():
        columns = list(dict.fromkeys(name for row in rows.values() for name, value in row.items() if _is_short(value)))
        lines += ["", f"| {section} | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
        for name, row in rows.items():
            lines.append(f"| {name} | {' | '.join(_told(row.get(column)) for column in columns)} |")
    return "\n".join(lines)


def summary(report: dict[str, Any]) -> list[str]:
    """What the chat and the workload come to, a line for the chat and one for each task."""
    sections, lines = report["sections"], []
    for name, chat in sections.get("chat", {}).items():
        last = chat["answers"]["recent turn"]
        lines.append(
            f"chat, {name}: time to the first token {chat['ratio']:.2f} of re-reading, {chat['paid_for_more']} turns "
            f"read more than what is new or moved, the last answer is {'right' if last['pruned_is_right'] else 'wrong'}"
            f" and {'the same text' if last['same_text'] else 'another text'} as behind all turns"
        )
    rows = sections.get("workload", {})
    for task in dict.fromkeys(name.partition("-")[0] for name in rows):
        ratios = sorted(row["ratio"] for name, row in rows.items() if name.startswith(f"{task}-"))
        shared = median(row["shared_words"] for name, row in rows.items() if name.startswith(f"{task}-"))
        lines.append(
            f"{task}, keep 0.5: time to the first token {median(ratios):.2f} of reading the whole (median of "
            f"{len(ratios)} prompts, {ratios[0]:.2f} to {ratios[-1]:.2f}), shared words {shared:.2f}"
        )
    return lines


def _is_short(value: object) -> bool:
    return isinstance(value, int | float | str)


def _told(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
