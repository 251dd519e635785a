"""The model of a cluster against a ring that is played through, and DistributedDataParallel's own buckets."""

from __future__ import annotations

import itertools
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from benchmarks.cluster import (
    NUM_FINDINGS,
    Cluster,
    Exchange,
    buckets_of,
    compute_for,
    exchange_of,
    main,
    ring_bytes,
    step_time,
)
from model import create_model
from trainer.stop import WATCHED


def play_ring(numbers: np.ndarray) -> tuple[np.ndarray, list[int]]:
    """Add up the rows of (processes, values), each process sending to the next; return all, and the values sent."""
    size = len(numbers)
    held = [np.array_split(row.copy(), size) for row in numbers]
    sent = [0] * size
    for step in range(2 * (size - 1)):
        is_adding = step < size - 1
        chunks = [(rank - step) % size for rank in range(size)]
        moved = [held[rank][chunks[rank]].copy() for rank in range(size)]
        for rank in range(size):
            target = held[(rank + 1) % size]
            target[chunks[rank]] = moved[rank] + (target[chunks[rank]] if is_adding else 0)
            sent[rank] += moved[rank].size
    return np.array([np.concatenate(row) for row in held]), sent


@pytest.mark.parametrize("size", [2, 3, 8])
def test_a_ring_that_is_played_sends_as_many_bytes(size):
    numbers = np.random.default_rng(0).standard_normal((size, 24 * size))
    summed, sent = play_ring(numbers)
    np.testing.assert_allclose(summed, np.broadcast_to(numbers.sum(0), numbers.shape))
    assert sent == [ring_bytes(numbers.shape[1], size)] * size


@pytest.fixture
def group():
    store = distributed.HashStore()
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1, timeout=timedelta(seconds=60))
    yield
    distributed.destroy_process_group()


def note(sizes, bucket):
    sizes.append(bucket.buffer().nbytes)
    future = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future


@pytest.mark.filterwarnings("ignore:Grad strides do not match")
def test_the_buckets_are_those_of_a_step(group, one_thread):
    network = create_model("MobileMamba_T2", num_classes=10)
    parallel = DistributedDataParallel(network)
    sent: list[int] = []
    parallel.register_comm_hook(sent, note)
    for _ in range(2):  # the buckets of the first step are not final
        sent.clear()
        parallel(torch.randn(2, 3, 64, 64)).sum().backward()
    buckets = buckets_of(network)
    assert sum(buckets) == sum(sent)
    np.testing.assert_allclose(buckets, sent, rtol=0.1)  # a branch's gradients may come before another's


def test_the_findings_are_those_of_a_step():
    assert 3 + len(WATCHED) == NUM_FINDINGS


def test_a_step_takes_longer_the_more_is_exchanged():
    exchange = exchange_of(create_model("MobileMamba_B1"))
    assert step_time(exchange, Cluster(nodes=1, gpus=1), compute=0.1).exposed == pytest.approx(0.1)
    times = [step_time(exchange, Cluster(nodes=nodes), compute=0.1) for nodes in (1, 2, 4, 8, 16, 32, 64)]
    for time, next_time in itertools.pairwise(times):
        assert 0.1 < time.hidden < time.exposed < next_time.exposed
    # Many bytes take as long as the slowest link needs for them.
    big = Exchange(buckets=(10**12,), buffers=())
    assert step_time(big, Cluster(nodes=2), compute=0.0).exposed == pytest.approx(2 * 15 / 16 * 1e12 / 50e9, rel=1e-3)


@pytest.mark.parametrize("nodes", [1, 8, 64])
def test_from_that_step_on_the_share_is_reached(nodes):
    exchange = exchange_of(create_model("MobileMamba_T2"))
    cluster = Cluster(nodes=nodes)
    least = compute_for(0.9, exchange, cluster)
    for kind in ("hidden", "exposed"):
        compute = getattr(least, kind)
        assert compute / getattr(step_time(exchange, cluster, compute=compute), kind) == pytest.approx(0.9)


def test_the_table(capsys):
    main(["--step-seconds", "0.2", "--batch", "64", "--nodes", "1", "64"])
    lines = capsys.readouterr().out.splitlines()
    assert "MobileMamba_T2" in lines[0]
    assert [line.split("|")[2].strip() for line in lines[3:]] == ["8", "512"]
    with pytest.raises(SystemExit):
        main(["--step-seconds", "0"])


@pytest.mark.parametrize("variant", ["MobileMamba_T2", "MobileMamba_B4"])
def test_the_guide_shows_what_is_computed(capsys, variant):
    main(["--variant", variant])
    guide = (Path(__file__).resolve().parents[2] / "docs" / "scale.md").read_text(encoding="utf-8")
    assert capsys.readouterr().out.split("\n", 1)[1].strip() in guide
