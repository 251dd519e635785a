"""The test of a network on 64 ranks, which are threads here, counts every image exactly once."""

from __future__ import annotations

import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from data import Batch
from data.samplers import EvaluationSampler
from trainer.evaluate import Evaluator
from trainer.precision import Precision
from trainer.stop import SignalWatch
from util.distributed import Process
from util.meters import Meters

NUM_RANKS = 64
NUM_CLASSES = 10


class Meeting:
    """Where threads exchange values; one that does not come breaks it for all."""

    def __init__(self) -> None:
        self.values: list[Any] = [None] * NUM_RANKS
        self.barrier = threading.Barrier(NUM_RANKS, timeout=60)

    def gather(self, rank: int, value: Any) -> list[Any]:
        self.values[rank] = value
        self.barrier.wait()
        values = list(self.values)
        self.barrier.wait()
        return values


@dataclass(frozen=True, kw_only=True)
class ThreadProcess(Process):
    meeting: Meeting = field(default_factory=Meeting, compare=False)

    def gather_objects(self, value):
        return self.meeting.gather(self.rank, value)

    def sum(self, values):
        return [sum(column) for column in zip(*self.gather_objects(list(values)), strict=True)]

    def sum_tensor(self, values):
        return values.copy_(torch.stack(self.gather_objects(values.clone())).sum(0))


class Table(nn.Module):
    """Gives image i, whose pixels say i, the i-th row of logits; counts who was asked for."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits
        self.asked: Counter[int] = Counter()
        self.lock = threading.Lock()

    def forward(self, images: Tensor) -> Tensor:
        indices = images[:, 0, 0, 0].long()
        with self.lock:
            self.asked.update(indices.tolist())
        return self.logits[indices]


class Shard:
    def __init__(self, targets: Tensor, rank: int) -> None:
        self.num_images = len(targets)
        self.targets = targets
        self.sampler = EvaluationSampler(len(targets), batch_size=5, rank=rank, world_size=NUM_RANKS)

    def __len__(self):
        return len(self.sampler)

    def iterate(self):
        for keys in self.sampler:
            indices = torch.tensor([key.image for key in keys])
            images = indices.double().view(-1, 1, 1, 1).expand(-1, 3, 2, 2)
            yield Batch(images, self.targets[indices], {})


@pytest.mark.parametrize("num_images", [1000, 15, 64 * 5 * 2 + 1])
def test_64_ranks_count_each_image_once(num_images):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(num_images, NUM_CLASSES, generator=generator)
    targets = torch.randint(NUM_CLASSES, (num_images,), generator=generator)
    network, meeting = Table(logits), Meeting()

    def test(rank: int):
        evaluator = Evaluator(
            loader=Shard(targets, rank),
            process=ThreadProcess(rank=rank, world_size=NUM_RANKS, meeting=meeting),
            precision=Precision(torch.device("cpu"), None),
            meters=Meters([]),
            log_every=2,
            watch=SignalWatch(),
            memory_format=torch.contiguous_format,
        )
        return evaluator(network, title="net")

    with ThreadPoolExecutor(NUM_RANKS) as threads:
        scores = list(threads.map(test, range(NUM_RANKS)))
    place = (logits > logits.gather(1, targets[:, None])).sum(1)  # classes before the right one
    expected = {"top1_count": int((place < 1).sum()), "top5_count": int((place < 5).sum()), "num_images": num_images}
    for score in scores:
        assert {name: getattr(score, name) for name in expected} == expected
    assert network.asked == Counter(range(num_images))
