"""How likely a drafted token is to stand, learnt from what became of earlier ones."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import TypeAlias

Scale: TypeAlias = Sequence[tuple[float, float]]
"""Steps of a drafter's confidence, increasing: (from this confidence on, chance to be accepted until it is known)."""

_PRIOR_WEIGHT = 4.0
_DECAY = 0.97
_MOST = 1 / (1 - _DECAY) + 1
"""More outcomes than are ever counted."""


class Acceptance:
    """Chance that a token is accepted, by the confidence that its drafter gives, with older outcomes fading.

    A token counts once those before it in its draft were accepted: the chance is conditional, and the chance of a
    whole draft is the product.
    """

    def __init__(self, scale: Scale) -> None:
        self._edges = [edge for edge, _ in scale]
        self._hits = [chance * _PRIOR_WEIGHT for _, chance in scale]
        self._counts = [_PRIOR_WEIGHT] * len(scale)
        self._mean = self._first_mean = 0.85

    @property
    def mean(self) -> float:
        """Chance of a token whose confidence is not known yet."""
        return self._mean

    def chance(self, confidence: float) -> float:
        """Chance of a token of that confidence."""
        step = self._step(confidence)
        return self._hits[step] / self._counts[step]

    def chances(self, confidence: Sequence[float]) -> list[float]:
        """Chance of each token of a draft, given those before it."""
        return [self.chance(value) for value in confidence]

    def relax(self) -> None:
        """Another text begins: what the last one taught about the mean counts half."""
        self._mean = (self._mean + self._first_mean) / 2

    def observe(self, confidence: float, accepted: bool) -> None:
        """A token of that confidence was accepted, or the first of its draft that was not."""
        step = self._step(confidence)
        self._hits[step] = self._hits[step] * _DECAY + accepted
        self._counts[step] = self._counts[step] * _DECAY + 1
        self._mean += (accepted - self._mean) * (1 - _DECAY)

    def observe_draft(self, confidence: Sequence[float], num_accepted: int) -> None:
        """A draft of such tokens had its first `num_accepted` accepted; what came after the next was never judged."""
        for i, value in enumerate(confidence[: num_accepted + 1]):
            self.observe(value, i < num_accepted)

    def to_json(self) -> dict[str, object]:
        """For the next run."""
        return {"hits": list(self._hits), "counts": list(self._counts), "mean": self._mean}

    def restore(self, kept: object) -> None:
        """Start from what `to_json` gave; what does not fit is ignored, since it is only a better guess."""
        if not isinstance(kept, dict):
            return
        hits, counts, mean = _numbers(kept.get("hits")), _numbers(kept.get("counts")), kept.get("mean")
        if not (len(hits) == len(counts) == len(self._edges) and isinstance(mean, float) and 0 <= mean <= 1):
            return
        if all(0 <= hit <= count and 0 < count <= _MOST for hit, count in zip(hits, counts, strict=True)):
            self._hits, self._counts, self._mean = list(hits), list(counts), mean

    def _step(self, confidence: float) -> int:
        return max(0, bisect_right(self._edges, confidence) - 1)


def _numbers(value: object) -> list[float]:
    return value if isinstance(value, list) and all(isinstance(number, float) for number in value) else []
