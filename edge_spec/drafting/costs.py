"""What passes cost on this machine, learnt from the passes themselves."""

from __future__ import annotations

from collections.abc import Mapping

_OWN, _SHARED = 0.2, 0.05
"""How far a pass moves the cost of its own width and, because the whole machine may have slowed, of the others."""
_WORST_SURPRISE = 2.0
"""A pass that took longer than this many times what was expected was interrupted, and counts as this."""
_ROW_SHARE = 0.2
"""Until it is measured: what each further row adds to a pass, in passes of one row."""


class Costs:
    """Seconds of a target's pass by its number of rows, and of a draft's token.

    Starts from a guess whose scale the first pass sets; each pass then corrects it. `alignment` is the target's row
    padding. `draft_share` is the guess for a draft token, in target passes of one row: weights are what a pass reads.
    """

    def __init__(self, *, max_rows: int, alignment: int = 1, draft_share: float = 0.3) -> None:
        self._alignment = alignment
        self._target = {rows: 1 + _ROW_SHARE * (rows - 1) for rows in range(alignment, max_rows + alignment, alignment)}
        self._draft_share = draft_share
        self._draft_s: float | None = None
        self._read_s: float | None = None
        self._measured = False

    def target_s(self, rows: int) -> float:
        """A pass of `rows` rows (of more than the model allows: as of the most)."""
        return self._target[min(self._padded(rows), max(self._target))]

    @property
    def draft_s(self) -> float:
        """One token of the draft model."""
        return self._draft_share * self.target_s(1) if self._draft_s is None else self._draft_s

    @property
    def read_s(self) -> float:
        """Each further token that the draft model has to read before it can draft."""
        return _ROW_SHARE * self.draft_s if self._read_s is None else self._read_s

    def observe_target(self, rows: int, seconds: float) -> None:
        """A pass of `rows` rows took so long."""
        own = min(self._padded(rows), max(self._target))
        if not self._measured:
            self._measured = True
            scale = seconds / self._target[own]
            self._target = {width: cost * scale for width, cost in self._target.items()}
            return
        surprise = _bounded(seconds / self._target[own])
        for width in self._target:
            self._target[width] *= surprise ** (_OWN if width == own else _SHARED)

    def observe_draft(self, tokens_read: int, seconds: float) -> None:
        """The draft model read `tokens_read` tokens, in one pass, to draft one."""
        if tokens_read <= 2:  # after a full acceptance there are two
            self._draft_s = _moved(self._draft_s, seconds)
        elif seconds > self.draft_s:
            self._read_s = _moved(self._read_s, (seconds - self.draft_s) / (tokens_read - 1))

    def to_json(self) -> dict[str, object]:
        """For the next start on this machine; empty before the first measurement."""
        if not self._measured:
            return {}
        target = {str(rows): seconds for rows, seconds in self._target.items()}
        return {"target": target, "draft_s": self._draft_s, "read_s": self._read_s}

    def restore(self, kept: Mapping[str, object]) -> None:
        """Start from what `to_json` gave; what does not fit is ignored, since it is only a better guess."""
        target = kept.get("target")
        if not isinstance(target, dict) or target.keys() != {str(rows) for rows in self._target}:
            return
        if all(isinstance(seconds, float) and 0 < seconds < 60 for seconds in target.values()):
            self._target = {int(rows): seconds for rows, seconds in target.items()}
            self._draft_s, self._read_s = (_seconds(kept.get(name)) for name in ("draft_s", "read_s"))
            self._measured = True

    def _padded(self, rows: int) -> int:
        return -(-rows // self._alignment) * self._alignment


def _bounded(ratio: float) -> float:
    return min(max(ratio, 1 / _WORST_SURPRISE), _WORST_SURPRISE)


def _moved(before: float | None, seconds: float) -> float:
    return seconds if before is None else before * _bounded(seconds / before) ** _OWN


def _seconds(value: object) -> float | None:
    return value if isinstance(value, float) and 0 < value < 60 else None
