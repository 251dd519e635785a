"""The interface of every data set: number of images, classes, and the image and label at an index."""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
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

    Attributes:
        buffer: All strings, without separators (uint8).
        starts: Where each begins, and at the end where the last one ends (int64).
    """

    def __init__(self, strings: Iterable[bytes]) -> None:
        buffer = bytearray()
        ends = [0]
        for string in strings:
            buffer += string
            ends.append(len(buffer))
        self.buffer = np.frombuffer(buffer, dtype=np.uint8)
        self.starts = np.array(ends, dtype=np.int64)

    @classmethod
    def from_arrays(cls, buffer: np.ndarray, starts: np.ndarray) -> BytesTable:
        """Return the table with these attributes."""
        table = cls(())
        table.buffer, table.starts = buffer, starts
        return table

    def __len__(self) -> int:
        return len(self.starts) - 1

    @overload
    def __getitem__(self, index: int) -> bytes: ...

    @overload
    def __getitem__(self, index: slice) -> list[bytes]: ...

    def __getitem__(self, index: int | slice) -> bytes | list[bytes]:
        if isinstance(index, slice):
            return [self[position] for position in range(*index.indices(len(self)))]
        position = range(len(self))[index]
        return self.buffer[self.starts[position] : self.starts[position + 1]].tobytes()

    def digest(self) -> bytes:
        """Return a hash of the strings and where each ends."""
        digest = hashlib.sha256(memoryview(self.starts))
        digest.update(memoryview(self.buffer))
        return digest.digest()


class ImageDataset(ABC):
    """One split of a data set; can be sent to workers.

    Attributes:
        source: File, folder or address that messages name.
        class_names: Name of each class, by class index.
        has_all_classes: Whether ``class_names`` is the whole list; otherwise there may be more than were seen here.
        labels: Class index per image (N,), int64; None where only reading an image tells its class.
        max_pixels: Larger images are unreadable; ``Data.max_pixels``, where that is given.
        mode: Of the images, by Pillow's name; one of ``images.MODES``.
        as_array: Whether `load` gives arrays (H, W, C), uint8, in place of images.
        block_sizes: Images per block (int64) where training shuffles blocks, as `BlockOrder` does; else None.
    """

    max_pixels: int = MAX_PIXELS
    mode: str = "RGB"
    as_array: bool = False
    block_sizes: np.ndarray | None = None

    def __init__(
        self,
        *,
        source: Path | str,
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
    def load(self, index: int) -> tuple[Image.Image | np.ndarray, int]:
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

    def _decoded(self, index: int, data: bytes, loader_type: str) -> Image.Image | np.ndarray:
        """Return an encoded image as `load` gives it; its name is made only for an error."""
        options = {"max_pixels": self.max_pixels, "mode": self.mode, "as_array": self.as_array}
        try:
            return decode(data, name="", loader_type=loader_type, **options)
        except UnreadableImageError as error:
            raise UnreadableImageError(self.name(index), error.cause) from error

    def close(self) -> None:  # noqa: B027 - most data sets keep no file open
        """Let go of open files; the next read opens them again."""

    def content_hashes(self, num_images: int) -> Iterator[bytes]:
        """Yield hashes of the contents of up to so many images, evenly spaced; it reads them."""
        for index in range(0, len(self), -(-len(self) // num_images)):
            try:
                data = self.read_bytes(index)
            except UnreadableImageError:
                data = b"unreadable"
            yield hashlib.sha256(data).digest()
        self.close()

    @abstractmethod
    def _digest(self) -> bytes:
        """Return a hash of the images' identities, the same wherever the data set lies."""

    def fingerprint(self) -> str:
        """Return a hash of size, class names, image names and labels, stable between runs and places."""
        digest = hashlib.sha256(f"{len(self)}\n".encode())
        digest.update("\0".join(self.class_names).encode(errors="surrogateescape"))
        digest.update(self._digest())
        if self.labels is not None:
            digest.update(memoryview(np.ascontiguousarray(self.labels)))
        return digest.hexdigest()


class FileDataset(ImageDataset):
    """Images in one file each.

    Args:
        folder: What the names are relative to.
        names: Path per image; a table of their bytes where there is one already.
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
        names: Sequence[str] | BytesTable,
        labels: Sequence[int] | np.ndarray,
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
        self._names = names if isinstance(names, BytesTable) else BytesTable(os.fsencode(name) for name in names)

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

    def load(self, index: int) -> tuple[Image.Image | np.ndarray, int]:
        """Return an image and its class index."""
        image = self._decoded(index, self.read_bytes(index), self.loader_type)
        return image, int(self.labels[index])

    def _digest(self) -> bytes:
        return self._names.digest()
