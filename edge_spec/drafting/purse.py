"""What a generation may lose by drafting: what it has won by it before, and a little more."""

from __future__ import annotations

_AT_FIRST = 0.5
"""Plain passes that may be lost before anything was won."""
_SHARE = 0.02
"""Of the time that plain decoding would have taken: may be lost too."""
_READING_SHARE = 0.15
"""The same, of what the draft model may take to read on: that is paid once, and the longer an answer has become, the
longer it is likely to go on (the rent-or-buy rule of Karlin et al., Competitive snoopy caching, 1988)."""


class Purse:
    """What may be lost, so that no answer gets much slower than plain decoding, whatever was expected of it.

    Expectations may be wrong all through one answer. A draft is made only if the purse could pay for it, should nothing
    of it stand; what stands fills the purse. All is counted in plain passes: a slower machine changes nothing.
    """

    def __init__(self) -> None:
        """For one generation."""
        self._left = _AT_FIRST
        self._plain = 0

    def pays(self, extra: float) -> bool:
        """Whether a step may take so much longer than a plain one."""
        return extra <= self._left

    def pays_reading(self, passes: float) -> bool:
        """Whether the draft model may read for so long."""
        return passes <= max(0.0, self._left) + _READING_SHARE * self._plain

    def settle(self, tokens: int, spent: float) -> None:
        """A step of `spent` plain passes wrote so many tokens, for which plain decoding takes as many passes."""
        self._plain += tokens
        self._left += tokens * (1 + _SHARE) - spent
