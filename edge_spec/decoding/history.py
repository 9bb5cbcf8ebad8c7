"""The sequence so far, counted for the penalties."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from edge_spec.decoding.prefix import common_prefix
from edge_spec.types import Hole


class History:
    """A prompt and what was generated after it. Grows and shrinks at its end, in constant time a token.

    What is evicted from its middle goes on counting for the penalties: it was written all the same.
    """

    def __init__(self, prompt: Sequence[int]) -> None:
        self.tokens = list(prompt)
        """The whole sequence; change it through the methods only."""
        self.num_evicted = 0
        self._floor = len(self.tokens)
        self._context = _Tally(self.tokens)
        self._generated = _Tally(())

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def context_ids(self) -> NDArray[np.int64]:
        """The distinct ids of prompt and generated tokens, int64 [k]."""
        return self._context.ids

    @property
    def generated_ids(self) -> NDArray[np.int64]:
        """The distinct ids of the generated tokens, int64 [k]."""
        return self._generated.ids

    @property
    def generated_counts(self) -> NDArray[np.float32]:
        """How often each of `generated_ids` was generated, float32 [k]."""
        return self._generated.counts

    def append(self, token: int) -> None:
        """Add one generated token."""
        self.tokens.append(token)
        self._context.push(token)
        self._generated.push(token)

    def extend(self, tokens: Iterable[int]) -> None:
        """Add generated tokens."""
        for token in tokens:
            self.append(token)

    def truncate(self, length: int) -> None:
        """Keep the first `length` tokens, at least the prompt and what there was at the latest eviction."""
        assert self._floor <= length <= len(self.tokens), (self._floor, length, len(self.tokens))
        while len(self.tokens) > length:
            token = self.tokens.pop()
            self._context.pop(token)
            self._generated.pop(token)

    def evict(self, start: int, end: int) -> Hole:
        """Drop the tokens [start, end), all but the last token having been read."""
        assert 0 <= start < end < len(self.tokens), (start, end, len(self.tokens))
        evicted = tuple(self.tokens[start:end])
        del self.tokens[start:end]
        self.num_evicted += len(evicted)
        self._floor = len(self.tokens)
        return Hole(start, evicted, len(self.tokens) - 1)

    def follow(self, context: Sequence[int]) -> None:
        """Become `context`, which begins with the same prompt."""
        sequence = context if isinstance(context, list) else list(context)
        shared = common_prefix(self.tokens, sequence)
        self.truncate(shared)
        self.extend(sequence[shared:])


class _Tally:
    """Distinct ids and their counts as arrays, for a multiset that only its latest member leaves.

    Ids stand in the order in which they first came, so an id whose count falls to 0 is always the last one.
    """

    def __init__(self, tokens: Sequence[int]) -> None:
        counter = Counter(tokens)
        capacity = len(counter) + 256
        self._slots = {token: slot for slot, token in enumerate(counter)}
        self._ids = np.zeros(capacity, dtype=np.int64)
        self._counts = np.zeros(capacity, dtype=np.float32)
        self._ids[: len(counter)] = list(counter)
        self._counts[: len(counter)] = list(counter.values())

    @property
    def ids(self) -> NDArray[np.int64]:
        return self._ids[: len(self._slots)]

    @property
    def counts(self) -> NDArray[np.float32]:
        return self._counts[: len(self._slots)]

    def push(self, token: int) -> None:
        slot = self._slots.setdefault(token, len(self._slots))
        if slot == len(self._ids):
            self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)])
            self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
        self._ids[slot] = token
        self._counts[slot] += 1

    def pop(self, token: int) -> None:
        slot = self._slots[token]
        self._counts[slot] -= 1
        if self._counts[slot] == 0:
            del self._slots[token]
