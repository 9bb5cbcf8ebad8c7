"""What passes cost on this machine, learnt from the passes themselves."""

from __future__ import annotations

from collections.abc import Mapping

from edge_spec.drafting.growth import Growth

_OWN, _SHARED = 0.2, 0.1
"""How far a pass moves the cost of its own width and, because the whole machine may have slowed, of the others."""
_WORST_SURPRISE = 2.0
"""A pass that took longer than this many times what was expected was interrupted, and counts as this."""
_LEAST_S = 1e-7
_ROW_SHARE = 0.2
"""Until it is measured: what each further row adds to a pass, in passes of one row; a token that the draft reads, in
those that it drafts."""
_MARGIN = 0.1
"""By so much a model's drafts have to be faster than plain decoding. Chances and costs are guesses, and what the model
has read is lost where they were wrong. Replayed (docs/performance.md), the worst answers lose less by it, and the mean
is the same."""
_LEAST_READ = 32
"""Tokens of a prompt that say what a row costs; fewer are little beside what every pass costs."""


class Costs:
    """Seconds of a target's pass by its number of rows, and of a draft's token.

    Widths that were not seen yet lie on the line through those that were; while only one was, the line's slope is what
    a token of a prompt took, or a guess.
    `alignment` is the target's row padding. `draft_share` is the guess for a draft token, in target passes of one row:
    weights are what a pass reads. `growth` and `draft_growth` are guesses of what a cached token adds.

    All is said of passes behind as many tokens as `move` was told last.
    """

    def __init__(
        self,
        *,
        max_rows: int,
        alignment: int = 1,
        draft_share: float = 0.3,
        growth: Growth | None = None,
        draft_growth: Growth | None = None,
    ) -> None:
        self._alignment = alignment
        self._widths = range(alignment, max_rows + alignment, alignment)
        self._seen: dict[int, float] = {}
        """Seconds by width, as they would be behind nothing."""
        self._line = (1 - _ROW_SHARE, _ROW_SHARE)
        self._draft_share = draft_share
        self._growth = growth or Growth()
        self._draft_growth = draft_growth or Growth()
        self._is_growth_known = False
        self._cached = 0
        self._draft_s: float | None = None
        self._read_s: float | None = None
        self._prompt_s: float | None = None
        """The target's, for a token of a prompt."""

    def target_s(self, rows: int) -> float:
        """A pass of `rows` rows (of more than the model allows: as of the most)."""
        width = self._width(rows)
        return self._base_s(width) + self._growth.passes(width, self._cached) * self._base_s(self._widths[0])

    @property
    def draft_s(self) -> float:
        """One token of the draft model."""
        base = self._draft_share * self._base_s(self._widths[0]) if self._draft_s is None else self._draft_s
        return base * self._draft_longer

    def move(self, cached: int) -> None:
        """From now on passes are behind `cached` tokens."""
        self._cached = cached

    @property
    def read_s(self) -> float:
        """Each further token that the draft model has to read before it can draft."""
        if self._read_s is not None:
            return self._read_s
        # Where reading costs the target much beside a pass of one row, rows are dear, for the draft as well.
        share = self._prompt_s / self._base_s(self._widths[0]) if self._prompt_s is not None and self._seen else 0.0
        return min(max(_ROW_SHARE, share), 1.0) * self.draft_s

    def best_fixed(self, chance: float, max_draft: int, reading_s: float = 0.0) -> tuple[float, int]:
        """Tokens a second of the best fixed length of the model's drafts, and that length, from 0 to `max_draft`.

        Unless drafts are faster than plain decoding by a margin, plain decoding's, and 0.

        `chance`: that a drafted token is accepted, given that all before it were. `reading_s`: what is paid for reading
        beforehand, for each token that profits from it. The expected tokens of a step are those of Leviathan et al.
        (arXiv 2211.17192, 3.1).
        """
        plain = 1 / self.target_s(1)
        rate, best, tokens = plain * (1 + _MARGIN), 0, 1.0
        for n in range(1, max_draft + 1):
            tokens += chance**n
            drafted = tokens / (self.target_s(n + 1) + n * self.draft_s + tokens * reading_s)
            if drafted > rate:
                rate, best = drafted, n
        return (rate, best) if best else (plain, 0)

    def observe_target(self, rows: int, seconds: float) -> None:
        """A pass of `rows` rows took so long."""
        width, seconds = self._width(rows), max(seconds, _LEAST_S)
        expected = self.target_s(rows)
        if width in self._seen:
            surprise = _bounded(seconds / expected)
            for other in self._seen:
                self._seen[other] *= surprise ** (_OWN if other == width else _SHARED)
            # A model that was parked while the machine was slow would else stay parked for good.
            if self._draft_s is not None:
                self._draft_s *= surprise**_SHARED
            if self._read_s is not None:
                self._read_s *= surprise**_SHARED
        else:
            self._seen[width] = seconds * self._base_s(width) / expected
        self._line = self._fit()

    def observe_prompt(self, tokens_read: int, seconds: float) -> None:
        """The target read so many tokens of a prompt, in passes as wide as they get.

        The quickest prompt counts: the first one may have waited for the weights to come from the disk.
        """
        if tokens_read >= _LEAST_READ:
            each = max(seconds / tokens_read, _LEAST_S)
            self._prompt_s = each if self._prompt_s is None else min(each, self._prompt_s)
            self._line = self._fit()

    def observe_draft(self, tokens_read: int, seconds: float) -> None:
        """The draft model read `tokens_read` tokens, in one pass, to draft one."""
        if tokens_read <= 2:  # after a full acceptance there are two
            self._draft_s = _moved(self._draft_s, seconds / self._draft_longer)
        elif seconds > self.draft_s:
            self._read_s = _moved(self._read_s, (seconds - self.draft_s) / (tokens_read - 1))

    def to_json(self) -> dict[str, object]:
        """For the next start on this machine; empty before the first measurement."""
        if not self._seen:
            return {}
        target = {str(width): seconds for width, seconds in self._seen.items()}
        kept: dict[str, object] = {"target": target, "draft_s": self._draft_s, "read_s": self._read_s}
        if self._is_growth_known:
            growths = {"growth": self._growth, "draft_growth": self._draft_growth}
            kept |= {name: [growth.fixed, growth.per_row] for name, growth in growths.items()}
        return kept

    def restore(self, kept: Mapping[str, object]) -> None:
        """Start from what `to_json` gave; what does not fit is ignored, since it is only a better guess."""
        target = kept.get("target")
        if not isinstance(target, dict) or not target.keys() <= {str(width) for width in self._widths}:
            return
        if all(_seconds(seconds) for seconds in target.values()):
            self._seen = {int(width): seconds for width, seconds in target.items()}
            self._draft_s, self._read_s = (_seconds(kept.get(name)) for name in ("draft_s", "read_s"))
            self._line = self._fit()
            growths = _growth(kept.get("growth")), _growth(kept.get("draft_growth"))
            self._is_growth_known = growths[0] is not None
            self._growth, self._draft_growth = growths[0] or self._growth, growths[1] or self._draft_growth

    @property
    def _draft_longer(self) -> float:
        """How many times as long a draft token takes as one behind nothing."""
        return 1 + self._draft_growth.passes(1, self._cached)

    def _base_s(self, width: int) -> float:
        """A pass of this width behind nothing."""
        return self._seen.get(width) or self._line[0] + self._line[1] * width

    def _width(self, rows: int) -> int:
        return min(-(-rows // self._alignment) * self._alignment, self._widths[-1])

    def _fit(self) -> tuple[float, float]:
        """Intercept and slope of the line through what was seen, by least squares; never falling, and never
        below nothing."""
        widths, seconds = list(self._seen), list(self._seen.values())
        n, middle = len(widths), sum(widths) / max(1, len(widths))
        mean = sum(seconds) / max(1, n)
        spread = sum((width - middle) ** 2 for width in widths)
        if not spread:  # one width or none
            if n and self._prompt_s is not None:
                slope = min(self._prompt_s, mean / middle)
                return mean - slope * middle, slope
            scale = mean / (1 - _ROW_SHARE + _ROW_SHARE * middle) if n else 1.0
            return scale * (1 - _ROW_SHARE), scale * _ROW_SHARE
        slope = sum((width - middle) * (cost - mean) for width, cost in self._seen.items()) / spread
        slope = min(max(slope, 0.0), mean / middle)
        return mean - slope * middle, slope


def _bounded(ratio: float) -> float:
    return min(max(ratio, 1 / _WORST_SURPRISE), _WORST_SURPRISE)


def _moved(before: float | None, seconds: float) -> float:
    return seconds if before is None else before * _bounded(seconds / before) ** _OWN


def _growth(value: object) -> Growth | None:
    if not isinstance(value, list) or len(value) != 2:
        return None
    fixed, per_row = value
    if not all(isinstance(share, float) and 0 <= share < 1 for share in (fixed, per_row)):
        return None
    return Growth(fixed, per_row)


def _seconds(value: object) -> float | None:
    return value if isinstance(value, float) and 0 < value < 60 else None
