"""The images of each batch, on each process.

An epoch has one global order of images. Step ``b`` of all processes together takes the ``b``-th stretch of it, so that
neither the number of processes nor that of workers changes the order of training. Each image comes with a seed for its
augmentation, which depends only on the run's seed, the epoch and the position in the global order.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch.utils.data import Sampler

from .block_order import MAX_SEED, BlockOrder

__all__ = ["EvaluationSampler", "Key", "TrainSampler"]

SELECTION_UNIT = 256  # images; an epoch of repeated augmentation has a multiple of it, as in DeiT (arXiv 2012.12877)


class Key(NamedTuple):
    """A request for one augmented image: that at index ``image``."""

    image: int
    seed: int


class TrainSampler(Sampler[list[Key]]):
    """Batches of one process, the same number on each.

    With ``naive`` each image comes once an epoch. With ``ra`` (repeated augmentation, arXiv 1902.05509) each image
    that is drawn comes ``num_repeats`` times in a row, so that its views go to different processes; an epoch does
    not get longer.

    Args:
        num_images: Size of the training set.
        batch_size: Images a batch, per process.
        rank: This process.
        world_size: Number of processes.
        seed: The run's.
        sampler: ``naive`` or ``ra``.
        num_repeats: Views of an image, for ``ra``.
        drop_last: Leave out the last, partial batch of all processes. Otherwise the processes share it, and images
            from the epoch's start come again where it does not divide.
        block_sizes: Shuffle blocks of these many images (int64), as `BlockOrder` does, rather than all images.
    """

    def __init__(
        self,
        num_images: int,
        *,
        batch_size: int,
        rank: int,
        world_size: int,
        seed: int,
        sampler: str = "naive",
        num_repeats: int = 3,
        drop_last: bool = True,
        block_sizes: np.ndarray | None = None,
    ) -> None:
        self.num_images = num_images
        self.block_sizes = block_sizes
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self.num_repeats = num_repeats if sampler == "ra" else 1
        self.length = num_images
        if sampler == "ra" and num_images >= SELECTION_UNIT:
            self.length = num_images // SELECTION_UNIT * SELECTION_UNIT
        self._images_per_rank = -(-self.length // world_size)
        if drop_last:
            self._images_per_rank = self.length // (batch_size * world_size) * batch_size
        self._epoch = 0
        self._start_batch = 0

    def __len__(self) -> int:
        return -(-self._images_per_rank // self.batch_size)

    @property
    def smallest_batch(self) -> int:
        """Images in the last batch of an epoch, the smallest one."""
        return (self._images_per_rank - 1) % self.batch_size + 1

    def set_position(self, epoch: int, start_batch: int = 0) -> None:
        """Choose the epoch, and the batch of it, with which the next iteration starts.

        Raises:
            ValueError: If the epoch has fewer batches.
        """
        if not 0 <= start_batch <= len(self):
            raise ValueError(f"batch {start_batch} is outside the epoch, which has {len(self)} batches")
        self._epoch = epoch
        self._start_batch = start_batch

    def __iter__(self) -> Iterator[list[Key]]:
        order = self._order(self._epoch)
        for start in range(self._start_batch * self.batch_size, self._images_per_rank, self.batch_size):
            stop = min(start + self.batch_size, self._images_per_rank)
            images, seeds = order.at(np.arange(start, stop) * self.world_size + self.rank)
            yield [Key(*pair) for pair in zip(images.tolist(), seeds.tolist(), strict=True)]

    def _order(self, epoch: int) -> _Order:
        if self.block_sizes is None:
            return _WholeOrder(self, epoch)
        return BlockOrder(
            self.block_sizes, seed=self.seed, epoch=epoch, num_repeats=self.num_repeats, length=self.length
        )


class _Order(Protocol):
    def at(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return image indices and augmentation seeds at positions of the global order."""


class _WholeOrder:
    """One permutation of all images."""

    def __init__(self, sampler: TrainSampler, epoch: int) -> None:
        generator = torch.Generator().manual_seed(sampler.seed + epoch)
        order = torch.randperm(sampler.num_images, generator=generator)
        num_positions = sampler._images_per_rank * sampler.world_size
        self._seeds = torch.randint(MAX_SEED, (num_positions,), generator=generator).numpy()
        self._images = order.repeat_interleave(sampler.num_repeats)[: sampler.length].numpy()

    def at(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self._images[positions % len(self._images)], self._seeds[positions]


class EvaluationSampler(Sampler[list[Key]]):
    """Batches of one process; over all processes each image comes exactly once, so that their counts may differ.

    Args:
        num_images: Size of the test set.
        batch_size: Images a batch, per process.
        rank: This process.
        world_size: Number of processes.
    """

    def __init__(self, num_images: int, *, batch_size: int, rank: int, world_size: int) -> None:
        self.indices = range(rank, num_images, world_size)
        self.batch_size = batch_size

    def __len__(self) -> int:
        return -(-len(self.indices) // self.batch_size)

    def __iter__(self) -> Iterator[list[Key]]:
        for start in range(0, len(self.indices), self.batch_size):
            yield [Key(image, seed=image) for image in self.indices[start : start + self.batch_size]]
