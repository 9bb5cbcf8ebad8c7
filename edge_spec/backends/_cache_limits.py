"""What a cache refuses, in the same words on every backend."""

from __future__ import annotations

from edge_spec.errors import CacheUnsupportedError, ContextLengthError, UsageError
from edge_spec.export.architecture import DecoderConfig
from edge_spec.types import ModelSpec


def check_decoded(spec: ModelSpec, n: int, rows: int, length: int) -> None:
    """UsageError or ContextLengthError unless `n` tokens, `rows` of them scored, can follow `length` cached ones."""
    if not 0 <= rows <= min(n, spec.max_rows) or n == 0:
        raise UsageError(f"{rows} rows of {n} tokens; at most {spec.max_rows} rows, and no more than tokens")
    if length + n > spec.n_ctx:
        raise ContextLengthError(length + n, spec.n_ctx)


def check_kept(kept: int, length: int) -> None:
    """UsageError unless a cache of `length` tokens can be rolled back to `kept`."""
    if not 0 <= kept <= length:
        raise UsageError(f"cannot roll back to {kept}: {length} tokens are cached")


def check_evicted(spec: ModelSpec, start: int, end: int, length: int) -> None:
    """CacheUnsupportedError or UsageError unless [start, end) can be dropped from a cache of `length` tokens."""
    if not spec.can_evict:
        raise CacheUnsupportedError(f"{spec.name}: its {spec.kv_type} cache cannot drop tokens from its middle")
    if not 0 <= start <= end <= length:
        raise UsageError(f"cannot evict tokens {start} to {end}: {length} are cached")


def check_resized(spec: ModelSpec, length: int, n_ctx: int) -> None:
    """CacheUnsupportedError or UsageError unless a cache of `length` tokens can get room for `n_ctx`."""
    if not spec.can_resize:
        raise CacheUnsupportedError(f"{spec.name}: its cache cannot change its length")
    if not 1 <= n_ctx <= spec.n_ctx_train:
        raise UsageError(f"n_ctx={n_ctx}: {spec.name} takes from 1 to {spec.n_ctx_train} tokens")
    if n_ctx < length:
        raise UsageError(f"n_ctx={n_ctx}: {length} tokens are cached; evict some or roll back before")


def check_exact(config: DecoderConfig, name: str, n_ctx: int) -> None:
    """UsageError if an export is not right for so many tokens."""
    if config.n_ctx_exact and n_ctx > config.n_ctx_exact:
        raise UsageError(f"n_ctx={n_ctx}: {name} is exported for up to {config.n_ctx_exact} tokens")


def check_parks(spec: ModelSpec) -> None:
    """CacheUnsupportedError unless a model can set sequences aside."""
    if not spec.can_park:
        raise CacheUnsupportedError(f"{spec.name}: its cache cannot set a sequence aside")


def check_resumed(spec: ModelSpec, length: int | None) -> None:
    """UsageError unless a parked sequence of `length` tokens, None for one that is gone, can be cached again."""
    check_parks(spec)
    if length is None:
        raise UsageError(f"{spec.name}: this sequence is not parked here, or no longer")
    if length > spec.n_ctx:
        raise UsageError(f"{spec.name}: {length} tokens are parked, and the window has {spec.n_ctx}")
