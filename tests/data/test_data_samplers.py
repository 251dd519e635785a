"""Which images come on which process, and when."""

import hashlib
from collections import Counter

import pytest

from data.samplers import EvaluationSampler, TrainSampler


def make(rank=0, world_size=1, *, num_images=50, batch_size=4, epoch=0, start=0, **options):
    sampler = TrainSampler(
        num_images, batch_size=batch_size, rank=rank, world_size=world_size, seed=options.pop("seed", 42), **options
    )
    sampler.set_position(epoch, start)
    return sampler


def images(batches):
    return [key.image for batch in batches for key in batch]


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("num_images", [1, 2, 7, 12, 13])
def test_evaluation_sees_each_image_once(world_size, num_images):
    samplers = [
        EvaluationSampler(num_images, batch_size=2, rank=rank, world_size=world_size) for rank in range(world_size)
    ]
    assert sorted(image for sampler in samplers for image in images(sampler)) == list(range(num_images))
    assert [len(list(sampler)) for sampler in samplers] == [len(sampler) for sampler in samplers]
    assert images(samplers[-1]) == list(range(world_size - 1, num_images, world_size))


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_training_ranks_are_disjoint_and_equally_long(world_size):
    shares = [list(make(rank, world_size)) for rank in range(world_size)]
    num_batches = 50 // (4 * world_size)
    assert all(len(share) == num_batches and {len(batch) for batch in share} == {4} for share in shares)
    seen = [image for share in shares for image in images(share)]
    assert len(set(seen)) == len(seen) == num_batches * 4 * world_size


def test_global_batches_do_not_depend_on_the_number_of_processes():
    whole = [set(batch) for batch in make(batch_size=6)]
    for world_size in (2, 3):
        shares = [list(make(rank, world_size, batch_size=6 // world_size)) for rank in range(world_size)]
        assert [set().union(*batches) for batches in zip(*shares, strict=True)] == whole


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_without_drop_last_every_image_comes_and_ranks_agree(world_size):
    samplers = [make(rank, world_size, num_images=25, drop_last=False) for rank in range(world_size)]
    shares = [list(sampler) for sampler in samplers]
    assert len({tuple(len(batch) for batch in share) for share in shares}) == 1
    assert all(len(share) == len(sampler) for share, sampler in zip(shares, samplers, strict=True))
    counts = Counter(image for share in shares for image in images(share))
    assert set(counts) == set(range(25))
    assert sum(counts.values()) - 25 == -25 % world_size


def test_the_order_is_the_one_that_runs_began_with():
    digest = hashlib.sha256()
    for num_images, world_size, sampler, drop_last in (
        (50, 2, "naive", True),
        (1000, 3, "ra", False),
        (25, 3, "naive", False),
        (600, 2, "ra", True),
        (1, 3, "naive", False),
    ):
        for rank in range(world_size):
            options = {"num_images": num_images, "sampler": sampler, "drop_last": drop_last, "epoch": 3}
            digest.update(repr(list(make(rank, world_size, **options))).encode())
    assert digest.hexdigest() == "63d80f239f3e486f2dc62df3c663c730ca02bd3df2d54cc62927bc7f72f0e342"


def test_fewer_images_than_processes_wrap():
    assert [images(make(rank, 3, num_images=1, drop_last=False)) for rank in range(3)] == [[0], [0], [0]]


@pytest.mark.parametrize("sampler", ["naive", "ra"])
def test_an_epoch_can_be_taken_up_anywhere(sampler):
    whole = list(make(1, 2, epoch=3, sampler=sampler))
    for start in range(len(whole) + 1):
        assert list(make(1, 2, epoch=3, start=start, sampler=sampler)) == whole[start:]


def test_order_and_seeds_follow_run_and_epoch():
    first = list(make())
    assert list(make()) == first
    others = [list(make(epoch=1)), list(make(seed=7))]
    assert all(images(other) != images(first) for other in others)
    seeds = [key.seed for batches in (first, *others) for batch in batches for key in batch]
    assert len(set(seeds)) == len(seeds)


@pytest.mark.parametrize("start", [-1, 13])
def test_a_position_beyond_the_epoch_is_refused(start):
    with pytest.raises(ValueError, match="the epoch, which has 12 batches"):
        make(start=start)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_repeated_augmentation(world_size):
    shares = [list(make(rank, world_size, num_images=600, sampler="ra", num_repeats=3)) for rank in range(world_size)]
    keys = [key for share in shares for batch in share for key in batch]
    # 600 images make 2 units of 256 positions; each drawn image fills three of them, its last views may be cut off.
    assert len(keys) == 512 // (4 * world_size) * 4 * world_size
    counts = sorted(Counter(key.image for key in keys).values())
    assert counts[1:] == [3] * (len(counts) - 1)
    assert len({key.seed for key in keys}) == len(keys)
    if world_size == 3:
        views = [Counter(images(share)) for share in shares]
        assert all(max(view.values()) == 1 for view in views)


def test_repeated_augmentation_of_a_small_set():
    assert len(images(make(num_images=20, sampler="ra", num_repeats=2))) == 20
