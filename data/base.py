"""The interface of every data set: number of images, classes, and the image and label at an index."""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import overload

import numpy as np
from PIL import Image

from model.messages import printable

from .files import read_file
from .images import MAX_PIXELS, UnreadableImageError, decode

__all__ = ["BytesTable", "FileDataset", "ImageDataset", "index_names"]


def index_names(num_classes: int) -> list[str]:
    """Return names for classes that have none: their indices, with zeros in front so that they sort."""
    width = len(str(num_classes - 1))
    return [f"{index:0{width}d}" for index in range(num_classes)]


class BytesTable(Sequence[bytes]):
    """Byte strings in one buffer.

    A list of a million Python strings is gradually copied into every forked worker, as reading one changes its
    reference count; a buffer stays shared.
    """

    def __init__(self, strings: Iterable[bytes]) -> None:
        strings = list(strings)
        self.buffer = b"".join(strings)
        lengths = np.fromiter((len(string) for string in strings), dtype=np.int64, count=len(strings))
        self._starts = np.concatenate([[0], lengths.cumsum()])

    def __len__(self) -> int:
        return len(self._starts) - 1

    @overload
    def __getitem__(self, index: int) -> bytes: ...

    @overload
    def __getitem__(self, index: slice) -> list[bytes]: ...

    def __getitem__(self, index: int | slice) -> bytes | list[bytes]:
        if isinstance(index, slice):
            return [self[position] for position in range(*index.indices(len(self)))]
        position = range(len(self))[index]
        return self.buffer[self._starts[position] : self._starts[position + 1]]

    def digest(self) -> bytes:
        """Return a hash of the strings and where each ends."""
        return hashlib.sha256(self._starts.tobytes() + self.buffer).digest()


class ImageDataset(ABC):
    """One split of a data set; can be sent to workers.

    Attributes:
        source: File or folder that messages name.
        class_names: Name of each class, by class index.
        has_all_classes: Whether ``class_names`` is the whole list; otherwise there may be more than were seen here.
        labels: Class index per image (N,), int64; None where only reading an image tells its class.
        max_pixels: Larger images are unreadable; ``Data.max_pixels``, where that is given.
        mode: Of the images, by Pillow's name; one of ``images.MODES``.
    """

    max_pixels: int = MAX_PIXELS
    mode: str = "RGB"

    def __init__(
        self,
        *,
        source: Path,
        class_names: Sequence[str],
        has_all_classes: bool,
        labels: np.ndarray | None,
    ) -> None:
        self.source = source
        self.class_names = list(class_names)
        self.has_all_classes = has_all_classes
        self.labels = labels

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of images."""

    @abstractmethod
    def name(self, index: int) -> str:
        """Return the name of an image in messages."""

    @abstractmethod
    def load(self, index: int) -> tuple[Image.Image, int]:
        """Return an image in the data set's mode, and its class index.

        Raises:
            UnreadableImageError: If the image is missing or broken.
            ValueError: If the data set itself is broken.
        """

    @abstractmethod
    def read_bytes(self, index: int) -> bytes:
        """Return an image as it is stored.

        Raises:
            UnreadableImageError: If it cannot be read.
            ValueError: If the data set itself is broken.
        """

    def close(self) -> None:  # noqa: B027 - most data sets keep no file open
        """Let go of open files; the next read opens them again."""

    @abstractmethod
    def _digest(self) -> bytes:
        """Return a hash of the images' identities, the same wherever the data set lies."""

    def fingerprint(self) -> str:
        """Return a hash of size, class names, image names and labels, stable between runs and places."""
        digest = hashlib.sha256(f"{len(self)}\n".encode())
        digest.update("\0".join(self.class_names).encode(errors="surrogateescape"))
        digest.update(self._digest())
        if self.labels is not None:
            digest.update(self.labels.tobytes())
        return digest.hexdigest()


class FileDataset(ImageDataset):
    """Images in one file each.

    Args:
        folder: What the names are relative to.
        names: Path per image.
        labels: Class index per image.
        source: File or folder that messages name.
        class_names: Name of each class.
        has_all_classes: Whether these are all.
        loader_type: Who decodes; a key of ``images.DECODERS``.
    """

    labels: np.ndarray

    def __init__(
        self,
        folder: Path,
        names: Sequence[str],
        labels: Sequence[int],
        *,
        source: Path,
        class_names: Sequence[str],
        has_all_classes: bool,
        loader_type: str,
    ) -> None:
        super().__init__(
            source=source,
            class_names=class_names,
            has_all_classes=has_all_classes,
            labels=np.asarray(labels, dtype=np.int64),
        )
        self.folder = folder
        self.loader_type = loader_type
        self._names = BytesTable(os.fsencode(name) for name in names)

    def __len__(self) -> int:
        return len(self._names)

    def path(self, index: int) -> Path:
        """Return the file of an image."""
        return self.folder / os.fsdecode(self._names[index])

    def name(self, index: int) -> str:
        """Return the file's path, as messages show it."""
        return printable(self.path(index))

    def read_bytes(self, index: int) -> bytes:
        """Return the file's content."""
        try:
            return read_file(self.path(index))
        except (OSError, ValueError) as error:  # a ValueError for a name with a zero byte in it
            raise UnreadableImageError(self.name(index), getattr(error, "strerror", None) or error) from error

    def load(self, index: int) -> tuple[Image.Image, int]:
        """Return an image and its class index."""
        data, name = self.read_bytes(index), self.name(index)
        image = decode(data, name=name, loader_type=self.loader_type, max_pixels=self.max_pixels, mode=self.mode)
        return image, int(self.labels[index])

    def _digest(self) -> bytes:
        return self._names.digest()
