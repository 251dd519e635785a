"""Images in tar shards, as WebDataset's, in a folder or behind an address."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import tarfile
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from PIL import Image
from tqdm import tqdm

from model.messages import listed, printable

from .base import ImageDataset, index_names
from .block_order import WINDOW, split_blocks
from .cache import Cache
from .folders import checked_label
from .images import UnreadableImageError
from .shard_cache import RemoteShards
from .shard_index import INDEXING, Shard, ShardIndex, find_shards, index_name, index_shard, read_class_names

__all__ = ["Shards", "build_index", "is_address"]

logger = logging.getLogger(__name__)

MAX_OPEN = 2 * WINDOW  # shards of which a process keeps the file open


def is_address(root: object) -> bool:
    """Return whether a data set's root is an address of the web rather than a folder."""
    return str(root).startswith(("http://", "https://"))


class Shards(ImageDataset):
    """The tar files ``<root>/train-000000.tar`` and so on, or ``val-...``; `shard_index` says what they hold.

    In a folder, an index is made at the first use. Behind an address there has to be one.

    Args:
        root: The data set's folder, or its address.
        split: ``train`` or ``val``.
        loader_type: Who decodes the images.
        cache: Where downloaded shards are kept, and an index that cannot be written beside its shards.

    Raises:
        ValueError: If there are no shards, one is missing or damaged, or the index is that of others.
        OSError: If an address does not answer.
    """

    def __init__(self, root: Path | str, *, split: str, loader_type: str = "pil", cache: Cache | None = None) -> None:
        cache = cache or Cache.create()
        self.root = str(root).rstrip("/")
        self.remote = RemoteShards(self.root, cache) if is_address(root) else None
        self.index = _local_index(Path(root), split, cache) if self.remote is None else self.remote.index(split)
        self.loader_type = loader_type
        self._files: OrderedDict[str, FileIO] = OrderedDict()
        names = self.index.class_names
        num_classes = _num_classes(self.index, f"{self.root}/{index_name(split)}")
        super().__init__(
            source=f"{self.root}/{split} shards",
            class_names=names or index_names(num_classes),
            has_all_classes=names is not None or split == "train",
            labels=self.index.labels,
        )
        self.block_sizes = split_blocks([shard.num_images for shard in self.index.shards])
        if self.remote is not None:
            self.remote.check_room(self.index)

    def __len__(self) -> int:
        return len(self.index)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_files": OrderedDict()}

    def name(self, index: int) -> str:
        """Return the shard, and the image's name in it; its first byte where that cannot be read."""
        shard, offset, _ = self.index.place(index)
        try:
            file = self._open(shard)
            header = os.pread(file.fileno(), tarfile.BLOCKSIZE, offset - tarfile.BLOCKSIZE)
            member = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape").name
        except (OSError, tarfile.TarError):
            member = f"byte {offset}"
        return printable(f"{self.root}/{shard.name}:{member}")

    def load(self, index: int) -> tuple[Image.Image | np.ndarray, int]:
        """Return an image and its class index."""
        image = self._decoded(index, self.read_bytes(index), self.loader_type)
        return image, int(self.index.labels[index])

    def read_bytes(self, index: int) -> bytes:
        """Return the encoded image."""
        shard, offset, size = self.index.place(index)
        try:
            data = os.pread(self._open(shard).fileno(), size, offset)
        except OSError as error:
            raise UnreadableImageError(self.name(index), error.strerror or error) from error
        if len(data) < size:
            raise UnreadableImageError(self.name(index), f"{shard.name} is cut short, of {shard.num_bytes} bytes")
        return data

    def close(self) -> None:
        """Let go of the shards that are open."""
        while self._files:
            self._files.popitem()[1].close()

    def content_hashes(self, num_images: int) -> Iterator[bytes]:
        """Yield hashes of evenly spaced images; of whole shards, by the index, where reading them is a download."""
        if self.remote is None:
            return super().content_hashes(num_images)
        return (shard.sha256.encode() for shard in self.index.shards)

    def _open(self, shard: Shard) -> FileIO:
        """Return a shard's open file. Reads name their place, so that forked processes can share it."""
        file = self._files.pop(shard.name, None)
        while file is None:
            path = Path(self.root, shard.name) if self.remote is None else self.remote.path(shard)
            try:
                file = FileIO(path)
            except FileNotFoundError:  # removed since, to make room for another one
                if self.remote is None:
                    raise
        self._files[shard.name] = file
        if len(self._files) > MAX_OPEN:
            self._files.popitem(last=False)[1].close()
        return file

    def _digest(self) -> bytes:
        shards = [(shard.name, shard.num_images, shard.num_bytes) for shard in self.index.shards]
        digest = hashlib.sha256(repr(shards).encode())
        digest.update(memoryview(self.index.offsets))
        digest.update(memoryview(self.index.sizes))
        return digest.digest()


def _num_classes(index: ShardIndex, source: str) -> int:
    checked_label(int(index.labels.min()), entry=source)
    return 1 + checked_label(int(index.labels.max()), entry=source)


def _local_index(folder: Path, split: str, cache: Cache) -> ShardIndex:
    names = find_shards(folder, split)
    if not names:
        found = listed(sorted(path.name for path in folder.iterdir())) or "nothing"
        raise ValueError(
            f"{folder} holds no shards such as {split}-000000.tar, but {found}; `python -m data.prepare shards` makes "
            "them from class folders, or point data.root at the folder that has them"
        )
    beside = folder / index_name(split)
    if beside.is_file():
        index = ShardIndex.load(beside)
        _check_shards(folder, names, index)
        return index
    return _cached_index(folder, split, names, cache)


def _check_shards(folder: Path, names: Sequence[str], index: ShardIndex) -> None:
    """Compare an index with the shards beside it; one that is cut short is left to the limit on unreadable images."""
    known = {shard.name: shard for shard in index.shards}
    for problem, differing in (
        ("are missing", known.keys() - set(names)),
        ("are not in the index", set(names) - known.keys()),
        ("are longer than in the index", {n for n in names if n in known and _size(folder / n) > known[n].num_bytes}),
    ):
        if differing:
            raise ValueError(
                f"{folder}: {len(differing)} shards {problem} ({listed(sorted(differing))}); fetch what is missing, or "
                f"make the index again: {INDEXING}"
            )
    for name, shard in known.items():
        if (size := _size(folder / name)) < shard.num_bytes:
            message = "%s is cut short: %d of %d bytes; the images beyond count as unreadable"
            logger.warning(message, folder / name, size, shard.num_bytes)


def _size(path: Path) -> int:
    return path.stat().st_size


def _cached_index(folder: Path, split: str, names: Sequence[str], cache: Cache) -> ShardIndex:
    """Return the index of shards that have none beside them, made unless the cache has that of just these files."""
    class_names = read_class_names(folder)
    states = [(name, status.st_size, status.st_mtime_ns) for name in names for status in [(folder / name).stat()]]
    path = cache.file("indices", (folder.resolve(), split, states, class_names), ".safetensors")
    with contextlib.ExitStack() as stack:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(FileLock(f"{path}.lock"))  # one of several ranks makes it, the others wait
            if path.is_file():
                return ShardIndex.load(path)
        except OSError as error:
            logger.warning("%s cannot be written (%s): each start reads the shards of %s", path, error, folder)
        logger.info("%s: reading the headers of %d shards, once; %s keeps them", folder, len(names), INDEXING)
        index = build_index(folder, split, class_names=class_names)
        with contextlib.suppress(OSError):
            index.save(path)
    return index


def build_index(folder: Path, split: str, *, class_names: list[str] | None, has_sha256: bool = False) -> ShardIndex:
    """Read the headers of a folder's shards.

    Args:
        folder: Where they lie.
        split: ``train`` or ``val``.
        class_names: Name of each class, if known.
        has_sha256: Read whole shards for their SHA-256, too.

    Raises:
        ValueError: If a shard is damaged, holds no image, or an image has no class index.
    """
    names = find_shards(folder, split)
    parts = [index_shard(folder, name, has_sha256=has_sha256) for name in tqdm(names, desc=f"{split}: reading shards")]
    if not any(shard.num_images for shard, _ in parts):
        raise ValueError(f"{folder}: the {len(names)} {split} shards hold no image")
    return ShardIndex.join(parts, class_names=class_names)
