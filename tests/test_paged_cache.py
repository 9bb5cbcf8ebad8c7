"""Laws of the paged cache: whatever fails or is interrupted, no block is lost and no table names another's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edge_spec.backends._block_pool import BlockPool
from edge_spec.backends._paged_cache import BLOCK, PagedCache, blocks_of
from edge_spec.export.reading import read_config
from edge_spec.formats.gguf import GGUFFile
from tests.tiny_models import write_tiny_gguf

LENGTH = 5 * BLOCK


@pytest.fixture
def cache(tmp_path: Path) -> PagedCache:
    with GGUFFile(write_tiny_gguf(tmp_path / "tiny.gguf", n_vocab=512)) as gguf:
        made = PagedCache(read_config(gguf), 512, 512, "f32", park_bytes=1 << 20)
    made.use(0, LENGTH)
    return made


def num_held(cache: PagedCache) -> int:
    """Blocks that are not free, each of them in a table as often as it has holders."""
    pool, counted = cache._pool, np.zeros(cache._pool._count, int)
    for table in [cache._table, *(one.table for one in cache.parked if one.table is not None)]:
        counted[table] += 1
    np.testing.assert_array_equal(pool.holders, counted)
    free = [*pool._written, *pool._untouched]
    assert sorted(free) == np.flatnonzero(counted == 0).tolist()
    return len(counted) - len(free)


@pytest.mark.parametrize("error", [MemoryError(), KeyboardInterrupt()])
def test_a_copy_that_fails_loses_no_block(
    cache: PagedCache, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    parked = cache.park(LENGTH)

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(BlockPool, "copy", fail)
    for _ in range(3):
        with pytest.raises(type(error)):
            cache.evict(4, 40, LENGTH)
    monkeypatch.undo()
    assert num_held(cache) == blocks_of(LENGTH)
    parked.free()


@pytest.mark.parametrize("call", ["take", "hold", "drop"])
@pytest.mark.parametrize("way_out", ["forget", "resume"])
def test_what_an_interrupt_left_is_counted_anew(
    cache: PagedCache, call: str, way_out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, other = cache.park(LENGTH), cache.park(2 * BLOCK)
    done = getattr(BlockPool, call)

    def interrupted(*arguments: object) -> None:
        done(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(BlockPool, call, interrupted)
    with pytest.raises(KeyboardInterrupt):
        cache.park(LENGTH) if call == "hold" else cache.use(3 * BLOCK, LENGTH)
    monkeypatch.undo()
    if way_out == "forget":
        cache.forget(0)
    else:
        cache.resume(kept)
    assert num_held(cache) == blocks_of(LENGTH)
    other.free()
    kept.free()
    cache.forget(0)
    assert num_held(cache) == 0


@pytest.mark.parametrize("call", ["_turn", "_allocate"])
def test_a_resize_that_fails_keeps_everything_or_nothing(
    cache: PagedCache, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    parked = cache.park(LENGTH)

    def fail(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(PagedCache, call, fail)
    with pytest.raises(MemoryError):
        cache.resize(400, 400)
    monkeypatch.undo()
    assert parked.is_free == (call == "_turn")
    assert num_held(cache) == (0 if parked.is_free else blocks_of(LENGTH))
    cache.forget(0)
    cache.use(0, 3 * BLOCK)
