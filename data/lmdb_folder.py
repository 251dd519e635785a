"""Images packed in ``train.lmdb`` and ``val.lmdb``."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from .base import ImageDataset, index_names
from .lmdb_file import LmdbFile

__all__ = ["ImageFolderLMDB"]

NUM_PROBES = 64


class ImageFolderLMDB(ImageDataset):
    """The records of ``<root>/<split>.lmdb``, a file or a folder.

    Args:
        root: The data set's folder.
        split: ``train`` or ``val``.
        loader_type: Who decodes the images.

    Raises:
        ValueError: If the file is missing, cut short or laid out otherwise.
    """

    def __init__(self, root: Path, *, split: str, loader_type: str = "pil") -> None:
        self.file = LmdbFile(root / f"{split}.lmdb")
        if len(self.file) == 0:
            raise ValueError(f"{self.file.path} holds no image; make it again, or give data.root another folder")
        super().__init__(
            source=self.file.path,
            class_names=self.file.class_names or self._seen_classes(),
            has_all_classes=self.file.class_names is not None,
            labels=self.file.labels,
        )
        self.loader_type = loader_type

    def __len__(self) -> int:
        return len(self.file)

    def name(self, index: int) -> str:
        """Return the file, and the path or key of the image in it."""
        return self.file.name(index)

    def load(self, index: int) -> tuple[Image.Image | np.ndarray, int]:
        """Return an image and its class index."""
        data, label = self.file.record(index)
        return self._decoded(index, data, self.loader_type), label

    def read_bytes(self, index: int) -> bytes:
        """Return the encoded image of a record."""
        return self.file.record(index)[0]

    def close(self) -> None:
        """Let go of the file: each worker opens its own."""
        self.file.close()

    def _seen_classes(self) -> list[str]:
        """Return names up to the highest class of some records; reading all would read the whole file."""
        probes = range(0, len(self.file), max(1, len(self.file) // NUM_PROBES))
        names = index_names(1 + max(self.file.record(index)[1] for index in probes))
        self.close()
        return names

    def _digest(self) -> bytes:
        return (self.file.paths or self.file.keys).digest()
