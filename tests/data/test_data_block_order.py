"""The order by blocks: every image once, the same from anywhere, small and quick whatever the size."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import block_order
from data.block_order import WINDOW, BlockOrder, split_blocks
from data.samplers import TrainSampler


def order(sizes, *, seed=3, epoch=0, repeats=1, laps=1):
    blocks = split_blocks(sizes)
    length = int(blocks.sum()) * repeats
    whole = BlockOrder(blocks, seed=seed, epoch=epoch, num_repeats=repeats, length=length)
    return whole, np.arange(length * laps)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=60).filter(any), st.integers(1, 3), st.data())
def test_every_image_comes_as_often_as_it_should_and_any_positions_give_the_same(sizes, repeats, data):
    whole, positions = order(sizes, repeats=repeats, laps=2)
    images, seeds = whole.at(positions)
    first, second = images.reshape(2, -1)
    assert np.array_equal(first, second)
    assert np.array_equal(first[::repeats].repeat(repeats), first)
    assert np.array_equal(np.sort(first[::repeats]), np.arange(sum(sizes)))
    assert len(set(seeds.tolist())) == len(seeds)
    some = np.array(sorted(data.draw(st.sets(st.integers(0, len(positions) - 1), min_size=1, max_size=9))))
    again = order(sizes, repeats=repeats, laps=2)[0]
    for chosen in (some, some[-1:]):
        assert np.array_equal(again.at(chosen), (images[chosen], seeds[chosen]))


def test_images_of_many_blocks_are_mixed_and_few_blocks_are_in_use():
    whole, positions = order([10] * 100)
    blocks = whole.at(positions)[0] // 10
    for start in range(0, 1000, 10 * WINDOW):
        window = blocks[start : start + 10 * WINDOW]
        assert len(set(window.tolist())) == len(window) // 10
        assert len(set(window[:10].tolist())) > 3
    assert sorted(set(blocks[: 10 * WINDOW].tolist())) != list(range(WINDOW))


def test_orders_differ_by_seed_and_epoch():
    orders = [order([10] * 40, seed=seed, epoch=epoch) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    images, seeds = zip(*(one.at(positions) for one, positions in orders), strict=True)
    assert len({tuple(one) for one in images}) == 3
    assert len(set(np.concatenate(seeds).tolist())) == 1200


def test_large_blocks_are_cut(monkeypatch):
    monkeypatch.setattr(block_order, "LARGEST_BLOCK", 8)
    assert split_blocks([3, 0, 8, 20, 1, 16]).tolist() == [3, 8, 8, 8, 4, 1, 8, 8]


@pytest.mark.parametrize("shard_size", [1250, 10**6, 10**9])
def test_a_billion_images_take_little_memory(shard_size):
    blocks = split_blocks(np.full(10**9 // shard_size, shard_size))
    tracemalloc.start()
    try:
        for rank in (0, 7):
            sampler = TrainSampler(10**9, batch_size=64, rank=rank, world_size=8, seed=1, block_sizes=blocks)
            sampler.set_position(2, len(sampler) - 1)
            (batch,) = sampler
            assert len({key.image for key in batch}) == 64
        assert tracemalloc.get_traced_memory()[1] < 50e6
    finally:
        tracemalloc.stop()
