"""One transformed image at a time, even where a file cannot be read, and several of them as a batch."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from model.messages import listed

from .base import ImageDataset
from .images import UnreadableImageError, no_pixel_limit
from .samplers import Key

__all__ = ["Batch", "Sample", "SampleReader", "collate", "isolated_randomness"]

MAX_REPLACEMENTS = 50


class Batch(NamedTuple):
    """The input of one step.

    Attributes:
        images: (B, C, H, W), float32.
        targets: Class indices (B,), int64.
        unreadable: Images that could not be read, by name, each with what is wrong with it. In training others stand
            in for them. In evaluation black ones do, with the true class, so that no score holds if any is listed.
    """

    images: Tensor
    targets: Tensor
    unreadable: dict[str, str]


class Sample(NamedTuple):
    """An image (C, H, W) and its class, or what is wrong with the data set, as a message that crosses processes."""

    image: Tensor | None = None
    label: int = 0
    unreadable: dict[str, str] = {}  # noqa: RUF012 - never changed
    error: str = ""


class SampleReader(Dataset[Sample]):
    """Reads and transforms the images of a data set.

    Args:
        dataset: One split.
        transform: From image to tensor (C, H, W).
        num_classes: Labels must be below.
        is_training: Replace unreadable images by others, rather than by black ones.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        transform: Callable[[Image.Image | np.ndarray], Tensor],
        *,
        num_classes: int,
        is_training: bool,
    ) -> None:
        self.dataset = dataset
        self.transform = transform
        self.num_classes = num_classes
        self.is_training = is_training

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: Key) -> Sample:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: Sequence[Key]) -> list[Sample]:
        """Return the samples of a batch, as a `DataLoader` asks for them."""
        with _kept_randomness(), no_pixel_limit():
            return [self._sample(key) for key in keys]

    def _sample(self, key: Key) -> Sample:
        unreadable: dict[str, str] = {}
        try:
            image, label = self._load(key, unreadable)
        except ValueError as error:
            return Sample(error=str(error))
        _seed_all(key.seed)
        return Sample(self.transform(image), label, unreadable)

    def _load(self, key: Key, unreadable: dict[str, str]) -> tuple[Image.Image | np.ndarray, int]:
        """Return the image at a key or, in training, the first readable one of those drawn with the key's seed."""
        draw = random.Random(key.seed)
        index = key.image
        for _ in range(MAX_REPLACEMENTS):
            try:
                image, label = self.dataset.load(index)
            except UnreadableImageError as error:
                unreadable[error.name] = error.cause
                if not self.is_training:
                    return Image.new(self.dataset.mode, (1, 1)), self._true_label(index)
            else:
                return image, self._checked(label, index)
            index = draw.randrange(len(self.dataset))
        examples = listed([f"{name} ({cause})" for name, cause in unreadable.items()])
        raise ValueError(
            f"{self.dataset.source}: {MAX_REPLACEMENTS} images drawn one after another cannot be read; check that "
            f"data.root is whole and can be reached: {examples}"
        )

    def _true_label(self, index: int) -> int:
        return 0 if self.dataset.labels is None else int(self.dataset.labels[index])

    def _checked(self, label: int, index: int) -> int:
        if label < self.num_classes:
            return label
        raise ValueError(
            f"{self.dataset.name(index)}: the class index {label} is outside 0..{self.num_classes - 1}; set nb_classes "
            "to the number of classes in the data set"
        )


@contextlib.contextmanager
def isolated_randomness(seed: int) -> Iterator[None]:
    """Seed Python, NumPy and PyTorch (CPU) for the duration, and put this process's own states back after it."""
    with _kept_randomness():
        _seed_all(seed)
        yield


@contextlib.contextmanager
def _kept_randomness() -> Iterator[None]:
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def _seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the GPUs too


def collate(samples: Sequence[Sample]) -> tuple[Batch | None, str]:
    """Return a batch, or None and the first message."""
    for sample in samples:
        if sample.error:
            return None, sample.error
    images = default_collate([sample.image for sample in samples])
    targets = torch.tensor([sample.label for sample in samples])
    unreadable = {name: cause for sample in samples for name, cause in sample.unreadable.items()}
    return Batch(images, targets, unreadable), ""
