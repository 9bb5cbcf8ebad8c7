"""Laws of the paged cache's memory: what was forgotten is given back, what is kept stays."""

from __future__ import annotations

import mmap

import numpy as np
import pytest

from edge_spec.backends._block_cache import GIVE_BACK, BlockCache

SHAPE = (64, 2, 32, 16)  # a block of 4,096 bytes


def filled(blocks: int) -> BlockCache:
    cache = BlockCache([SHAPE, SHAPE], np.float32)
    cache.use(blocks)
    for array in cache.arrays:
        array[:blocks] = 1
    return cache


def test_tensors_start_empty_and_apart() -> None:
    cache = filled(3)
    cache.arrays[0][:] = 2
    assert (cache.arrays[1][:3] == 1).all()
    assert not cache.arrays[1][3:].any()


@pytest.mark.parametrize("kept", [0, 1, 5, 40])
def test_kept_blocks_stay_and_many_forgotten_ones_are_given_back(kept: int) -> None:
    if not hasattr(mmap, "MADV_DONTNEED"):
        pytest.skip("the system cannot take memory back")
    cache = filled(kept + GIVE_BACK)
    cache.forget(kept)
    for array in cache.arrays:
        assert (array[:kept] == 1).all()
        whole_pages = -(-kept * 4096 // mmap.PAGESIZE) * mmap.PAGESIZE // 4096
        assert not array[whole_pages:].any(), "private pages that were given back read as zeros"


def test_few_forgotten_blocks_are_left_alone() -> None:
    cache = filled(20)
    cache.forget(20 - GIVE_BACK + 1)
    assert np.all(cache.arrays[0][:20] == 1)


def test_given_back_blocks_can_be_written_again() -> None:
    cache = filled(30)
    cache.forget(0)
    cache.use(10)
    cache.arrays[0][:10] = 3
    assert (cache.arrays[0][:10] == 3).all()
