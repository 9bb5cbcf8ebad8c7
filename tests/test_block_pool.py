"""Laws of the paged cache's memory: what nobody holds is given back, what somebody holds stays."""

from __future__ import annotations

import mmap

import numpy as np
import pytest

from edge_spec.backends._block_pool import GIVE_BACK, BlockPool, Blocks

SHAPE = (64, 2, 32, 16)  # a block of 4,096 bytes


def filled(blocks: int) -> tuple[BlockPool, Blocks]:
    pool = BlockPool([SHAPE, SHAPE], np.float32)
    taken = pool.take(blocks)
    for array in pool.arrays:
        array[taken] = 1
    return pool, taken


def test_tensors_start_empty_and_apart() -> None:
    pool, taken = filled(3)
    pool.arrays[0][:] = 2
    assert (pool.arrays[1][taken] == 1).all()
    assert np.count_nonzero(pool.arrays[1]) == np.count_nonzero(pool.arrays[1][taken])


@pytest.mark.parametrize("kept", [0, 1, 5, 40])
@pytest.mark.parametrize("scattered", [False, True])
def test_kept_blocks_stay_and_many_dropped_ones_are_given_back(kept: int, scattered: bool) -> None:
    if not hasattr(mmap, "MADV_DONTNEED"):
        pytest.skip("the system cannot take memory back")
    pool, taken = filled(kept + 2 * GIVE_BACK)
    if scattered:
        np.random.default_rng(0).shuffle(taken)
    pool.drop(taken[kept:])
    for array in pool.arrays:
        assert (array[taken[:kept]] == 1).all()
        if mmap.PAGESIZE == 4096:
            assert not array[taken[kept:]].any(), "private pages that were given back read as zeros"


def test_few_dropped_blocks_are_left_alone_and_taken_again_first() -> None:
    pool, taken = filled(20)
    pool.drop(taken[20 - GIVE_BACK + 1 :])
    assert np.all(pool.arrays[0][taken] == 1)
    assert set(pool.take(GIVE_BACK - 1)) == set(taken[20 - GIVE_BACK + 1 :])


def test_given_back_blocks_can_be_written_again() -> None:
    pool, taken = filled(30)
    pool.drop(taken)
    again = pool.take(64)
    pool.arrays[0][again] = 3
    assert (pool.arrays[0] == 3).all()


def test_a_block_is_free_when_its_last_holder_drops_it() -> None:
    pool, taken = filled(60)
    pool.hold(taken[:30])
    pool.drop(taken)
    assert (pool.arrays[0][taken[:30]] == 1).all()
    with pytest.raises(MemoryError):
        pool.take(35)
    assert len(pool.take(34)) == 34, "the attempt took none"
    pool.drop(taken[:30])
    assert len(pool.take(30)) == 30


def test_another_pool_takes_what_is_held_with_its_holders() -> None:
    pool, taken = filled(40)
    pool.arrays[1][taken] = np.arange(40, dtype=np.float32)[:, None, None, None]
    pool.hold(taken[5:7])
    smaller = BlockPool([(8, *SHAPE[1:])] * 2, np.float32)
    smaller.take_over(pool, taken[4:10])
    assert smaller.holders.tolist() == [1, 2, 2, 1, 1, 1, 0, 0]
    assert smaller.arrays[1][:6, 0, 0, 0].tolist() == [4, 5, 6, 7, 8, 9]
    with pytest.raises(MemoryError):
        BlockPool([(5, *SHAPE[1:])] * 2, np.float32).take_over(pool, taken[4:10])
