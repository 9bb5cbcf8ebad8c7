"""Models without weights: whole language models on NumPy, for laws that need no real one."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from edge_spec.backends.base import Parked
from edge_spec.backends.top_k import top_k
from edge_spec.errors import BackendError, CacheUnsupportedError, ContextLengthError, RollbackUnsupportedError
from edge_spec.types import Decoded, Logits, ModelSpec, Output

N_CTX_TRAIN = 512


@dataclass(frozen=True)
class Call:
    """One decode: `tokens` were appended behind the first `start` ones, logits were asked for `rows` of them."""

    start: int
    tokens: tuple[int, ...]
    rows: int


class FakeParked:
    """A copy of a `FakeLM`'s cache, and of what a subclass keeps for each token."""

    def __init__(self, model: FakeLM, tokens: Sequence[int], more: Sequence[int]) -> None:
        self.model = model
        self.tokens: list[int] | None = list(tokens)
        self.more = list(more)
        self.length = len(tokens)

    @property
    def n_bytes(self) -> int:
        return 0 if self.tokens is None else len(self.tokens) * self.model.spec.kv_bytes_per_token

    def free(self) -> None:
        self.tokens = None


class FakeLM:
    """A deterministic tiny language model that implements `CausalLM`.

    The logits after a sequence are drawn once from a generator seeded with `seed` and the sequence's last `order`
    tokens (None: with all of it, so that any mistake in the cache shows). They are standard normal times `sharpness`.
    All rows live in one buffer that the next decode overwrites with NaN first, so a stale view is found out.

    `max_rollback`: most tokens that one rollback may drop (a rollback to 0 is always allowed); None: any number.
    `fail_at`: the decode call, counted from 0, that raises BackendError and leaves rubbish in the cache.
    Records: `calls` (every decode), `rollbacks` (every length that was asked for),
    `evictions` (every range), `tokens` (the cache itself).
    """

    def __init__(
        self,
        n_vocab: int = 16,
        n_ctx: int = 64,
        seed: int = 0,
        *,
        max_rows: int = 8,
        sharpness: float = 1.5,
        row_alignment: int | None = 1,
        max_rollback: int | None = None,
        fail_at: int | None = None,
        order: int | None = 2,
        can_evict: bool = True,
        can_resize: bool = True,
        can_park: bool = True,
        name: str = "fake",
    ) -> None:
        self.spec = ModelSpec(
            name=name,
            architecture="fake",
            n_vocab=n_vocab,
            n_ctx=n_ctx,
            n_ctx_train=max(n_ctx, N_CTX_TRAIN),
            n_layer=1,
            n_kv_heads=1,
            head_dim=1,
            weight_bytes=0,
            kv_bytes_per_token=1,
            max_rows=max_rows,
            row_alignment=row_alignment,
            can_evict=can_evict,
            can_resize=can_resize,
            can_park=can_park,
            can_roll_back=max_rollback != 0,
        )
        self.seed = seed
        self.sharpness = sharpness
        self.max_rollback = max_rollback
        self.fail_at = fail_at
        self.order = order
        self.tokens: list[int] = []
        self.calls: list[Call] = []
        self.rollbacks: list[int] = []
        self.evictions: list[tuple[int, int]] = []
        self.closed = False
        self._buffer = np.full((max_rows, n_vocab), np.nan, dtype=np.float32)
        self._rows: dict[tuple[int, ...], Logits] = {}

    @property
    def length(self) -> int:
        return len(self.tokens)

    @property
    def num_decoded(self) -> int:
        """Tokens that all decodes together were given: what a real model would have paid for."""
        return sum(len(call.tokens) for call in self.calls)

    def logits_after(self, sequence: Sequence[int]) -> Logits:
        """The logits, shape [n_vocab], for the token that follows a non-empty `sequence`; pure."""
        key = tuple(sequence if self.order is None else sequence[-self.order :])
        if key not in self._rows:
            normal = np.random.default_rng([self.seed, *key]).standard_normal(self.spec.n_vocab)
            self._rows[key] = (self.sharpness * normal).astype(np.float32)
        return self._rows[key]

    def decode(self, tokens: Sequence[int], *, rows: int = 1, want: Output = Output.LOGITS) -> Decoded:
        if self.closed:
            raise BackendError(f"{self.spec.name} is closed")
        assert len(tokens) > 0, "a decode needs tokens"
        assert 0 <= rows <= min(len(tokens), self.spec.max_rows), (rows, len(tokens))
        assert all(0 <= token < self.spec.n_vocab for token in tokens), tokens
        self._buffer.fill(np.nan)
        needed = len(self.tokens) + len(tokens)
        if needed > self.spec.n_ctx:
            raise ContextLengthError(needed, self.spec.n_ctx)
        call = Call(len(self.tokens), tuple(int(token) for token in tokens), rows)
        self.calls.append(call)
        if self.fail_at == len(self.calls) - 1:
            self.tokens += [0] * len(tokens)
            raise BackendError("the fake library failed, as it was asked to")
        self.tokens += call.tokens
        for row in range(rows):
            self._buffer[row] = self.logits_after(self.tokens[: needed - rows + row + 1])
        logits = self._buffer[:rows]
        return Decoded(logits) if want is Output.LOGITS else Decoded(logits[:0], top_k(logits))

    def rollback(self, length: int) -> None:
        if self.closed:
            raise BackendError(f"{self.spec.name} is closed")
        assert 0 <= length <= len(self.tokens), (length, len(self.tokens))
        self.rollbacks.append(length)
        dropped = len(self.tokens) - length
        if self.max_rollback is not None and length > 0 and dropped > self.max_rollback:
            raise RollbackUnsupportedError(f"cannot drop {dropped} tokens, at most {self.max_rollback}")
        del self.tokens[length:]

    def evict(self, start: int, end: int) -> None:
        if not self.spec.can_evict:
            raise CacheUnsupportedError(f"{self.spec.name} cannot evict")
        assert 0 <= start <= end <= len(self.tokens), (start, end, len(self.tokens))
        self.evictions.append((start, end))
        del self.tokens[start:end]

    def resize(self, n_ctx: int) -> None:
        if self.closed:
            raise BackendError(f"{self.spec.name} is closed")
        if not self.spec.can_resize:
            raise CacheUnsupportedError(f"{self.spec.name} cannot resize")
        assert len(self.tokens) <= n_ctx <= self.spec.n_ctx_train, (len(self.tokens), n_ctx)
        assert n_ctx >= 1
        self.spec = replace(self.spec, n_ctx=n_ctx)

    @property
    def per_token(self) -> list[int]:
        """What a subclass keeps for each token, to be parked with it; changed in place."""
        return []

    @property
    def park_bytes(self) -> int:
        return len(self.tokens) * self.spec.kv_bytes_per_token

    def park(self) -> Parked:
        if self.closed:
            raise BackendError(f"{self.spec.name} is closed")
        if not self.spec.can_park:
            raise CacheUnsupportedError(f"{self.spec.name} cannot park")
        return FakeParked(self, self.tokens, self.per_token)

    def resume(self, parked: Parked) -> None:
        if self.closed:
            raise BackendError(f"{self.spec.name} is closed")
        assert isinstance(parked, FakeParked)
        assert parked.tokens is not None, "what was freed is resumed"
        assert parked.model is self
        assert parked.length <= self.spec.n_ctx
        self.tokens, self.per_token[:] = list(parked.tokens), parked.more
        parked.free()

    def swap(self, parked: Parked) -> Parked:
        left = self.park()
        self.resume(parked)
        return left

    def close(self) -> None:
        self.closed = True


class ScriptedLM(FakeLM):
    """Writes `script`, then `stop_id`, whatever the prompt; its logits are peaked (`margin` above all others).

    Where a sequence ends with the first j tokens of the script (the largest j counts), the next token is the j-th;
    so a prompt must not end with a beginning of the script.
    """

    def __init__(
        self,
        script: Sequence[int],
        stop_id: int,
        *,
        n_vocab: int = 258,
        n_ctx: int = 256,
        max_rows: int = 8,
        margin: float = 20.0,
        max_rollback: int | None = None,
        fail_at: int | None = None,
        name: str = "scripted",
    ) -> None:
        super().__init__(n_vocab, n_ctx, max_rows=max_rows, max_rollback=max_rollback, fail_at=fail_at, name=name)
        self.script = [int(token) for token in script]
        self.stop_id = stop_id
        self.margin = margin

    def logits_after(self, sequence: Sequence[int]) -> Logits:
        written = list(sequence[-len(self.script) :]) if self.script else []
        while written != self.script[: len(written)]:
            written = written[1:]
        upcoming = [*self.script, self.stop_id][len(written)]
        logits = np.zeros(self.spec.n_vocab, dtype=np.float32)
        logits[upcoming] = self.margin
        return logits


class FakeTokenizer:
    """UTF-8 bytes are ids 0 to 255; `<|bos|>` is 256, `<|eot|>` (which ends a turn) is 257."""

    bos_id = 256
    eot_id = 257
    n_vocab = 258
    _specials = {"<|bos|>": 256, "<|eot|>": 257}  # noqa: RUF012 - never changed

    @property
    def stop_ids(self) -> frozenset[int]:
        return frozenset({self.eot_id})

    def encode(self, text: str, *, special: bool = False, add_bos: bool = False) -> list[int]:
        """Ids of `text`; `special` reads the specials' spellings as those tokens, not as their bytes."""
        parts = re.split(r"(<\|bos\|>|<\|eot\|>)", text) if special else [text]
        ids = [self.bos_id] if add_bos else []
        for part in parts:
            ids += [self._specials[part]] if special and part in self._specials else part.encode()
        return ids

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        spellings = {token: b"" if skip_special else text.encode() for text, token in self._specials.items()}
        return b"".join(spellings.get(token, bytes([token % 256])) for token in ids).decode(errors="replace")

    def stream(self) -> FakeTokenStream:
        return FakeTokenStream()


class FakeTokenStream:
    """Detokenises one id at a time; gives out whole characters only, specials as nothing."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        return self._decoder.decode(bytes([token])) if token < 256 else ""

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)
