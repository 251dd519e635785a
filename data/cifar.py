"""CIFAR-10 and CIFAR-100 in the binary files that their authors publish, read by torchvision."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import ClassVar

import numpy as np
from PIL import Image
from torchvision.datasets import CIFAR10, CIFAR100

from .base import ImageDataset

__all__ = ["Cifar10CLS", "Cifar100CLS"]


class _Cifar(ImageDataset):
    """Images of 32 x 32 pixels, held in memory.

    The files are pickles; torchvision reads them only if their MD5 sums are those of the published ones.

    Args:
        root: The folder that holds the unpacked archive.
        split: ``train`` or ``val`` (the published test images).
        loader_type: Of no effect: nothing is encoded.

    Raises:
        ValueError: If a file is missing or is not the published one.
    """

    labels: np.ndarray
    reader: ClassVar[type[CIFAR10]]

    def __init__(self, root: Path, *, split: str, loader_type: str = "pil") -> None:
        folder = root / self.reader.base_folder
        try:
            content = self.reader(root, train=split == "train", download=False)
        except RuntimeError as error:
            raise ValueError(
                f"{folder} is missing, or a file in it is not as published; unpack {self.reader.url} in {root}"
            ) from error
        super().__init__(
            source=folder,
            class_names=content.classes,
            has_all_classes=True,
            labels=np.asarray(content.targets, dtype=np.int64),
        )
        self.split = split
        self.pixels = content.data

    def __len__(self) -> int:
        return len(self.pixels)

    def name(self, index: int) -> str:
        """Return the split and the index."""
        return f"{self.source}:{self.split}:{index}"

    def load(self, index: int) -> tuple[Image.Image, int]:
        """Return an image and its class index."""
        return Image.fromarray(self.pixels[index]).convert(self.mode), int(self.labels[index])

    def read_bytes(self, index: int) -> bytes:
        """Return the pixels of an image."""
        return self.pixels[index].tobytes()

    def _digest(self) -> bytes:
        return hashlib.sha256(self.pixels.tobytes()).digest()


class Cifar10CLS(_Cifar):
    """CIFAR-10: ``<root>/cifar-10-batches-py/``."""

    reader = CIFAR10


class Cifar100CLS(_Cifar):
    """CIFAR-100: ``<root>/cifar-100-python/``."""

    reader = CIFAR100
