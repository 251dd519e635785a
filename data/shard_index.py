"""Tar shards as WebDataset's: what lies in them, found by reading their headers once and kept as an index.

A sample is what lies in a row in a shard under one name up to the first dot: an image (``.jpg``, ``.png``, ...) and its
class index, as text in ``.cls`` or ``.txt``, or as ``label``, ``cls`` or ``class_id`` of an object in ``.json``.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import re
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import numpy as np

from model.messages import check_folder, listed, printable
from model.pictures import is_image_name

from .cache import load_arrays, save_arrays
from .folders import checked_label

__all__ = [
    "INDEXING",
    "Shard",
    "ShardIndex",
    "find_shards",
    "index_name",
    "index_shard",
    "read_class_names",
    "sha256_of",
]

FORMAT = "mobilemamba-shards-1"
CLASSES_FILE = "classes.json"
SPLIT_NAMES = {"train": "train", "val": "val|validation"}
LABEL_SUFFIXES = ("cls", "json", "txt")  # the first that a sample has is read
LABEL_ENTRIES = ("label", "cls", "class_id")
MAX_LABEL_BYTES = 1 << 20
INDEXING = "`python -m data.prepare index FOLDER`"


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One tar file.

    Attributes:
        name: Relative to the data set's folder or address.
        num_images: In it.
        num_bytes: Of the file.
        sha256: Of the file; empty where it is not known.
    """

    name: str
    num_images: int
    num_bytes: int
    sha256: str = ""


@dataclass(frozen=True, kw_only=True)
class ShardIndex:
    """Where each image of a split lies, N images in the order of the shards.

    Attributes:
        shards: The tar files.
        offsets: First byte of each image in its shard (N,), int64.
        sizes: Bytes of each image (N,), int64.
        labels: Class indices (N,), int64.
        class_names: Name of each class, if known.
    """

    shards: list[Shard]
    offsets: np.ndarray
    sizes: np.ndarray
    labels: np.ndarray
    class_names: list[str] | None

    def __len__(self) -> int:
        return len(self.labels)

    @functools.cached_property
    def first_images(self) -> np.ndarray:
        """The index of each shard's first image, and at the end the number of images (int64)."""
        return np.concatenate([[0], np.cumsum([shard.num_images for shard in self.shards])])

    def place(self, index: int) -> tuple[Shard, int, int]:
        """Return an image's shard, first byte and size.

        Raises:
            ValueError: If they lie outside the shard: the index is damaged.
        """
        shard = self.shards[int(np.searchsorted(self.first_images, index, side="right")) - 1]
        offset, size = int(self.offsets[index]), int(self.sizes[index])
        if not tarfile.BLOCKSIZE <= offset <= offset + size <= shard.num_bytes:
            raise ValueError(f"the index of {shard.name} places image {index} outside it; make it again ({INDEXING})")
        return shard, offset, size

    def save(self, path: Path) -> None:
        """Write the index to a file.

        Raises:
            OSError: If it cannot be written.
        """
        arrays = {"offsets": self.offsets, "sizes": self.sizes, "labels": self.labels}
        # One entry: of several, safetensors would write the order at random.
        content = {
            "format": FORMAT,
            "classes": self.class_names,
            "shards": [asdict(shard) for shard in self.shards],
        }
        save_arrays(path, arrays, {"content": json.dumps(content)})

    @classmethod
    def load(cls, path: Path) -> ShardIndex:
        """Read an index; its arrays stay in the file.

        Raises:
            ValueError: If it is damaged, or is no index.
        """
        arrays, metadata = load_arrays(path)
        arrays = {name: arrays[name] for name in ("offsets", "sizes", "labels") if name in arrays}
        try:
            content = json.loads(metadata.get("content", "{}"))
            if content.get("format") != FORMAT or len(arrays) < 3:
                raise ValueError("no index of shards, or one of another version")
            shards = [Shard(**entry) for entry in content["shards"]]
            index = cls(shards=shards, class_names=content["classes"], **arrays)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is damaged ({error}); make it again ({INDEXING})") from error
        if strange := [shard.name for shard in shards if Path(shard.name).name != shard.name or shard.name[:1] == "."]:
            raise ValueError(f"{path} names shards outside its folder: {listed(strange)}; make it again ({INDEXING})")
        counts = {len(index.offsets), len(index.sizes), len(index.labels), int(index.first_images[-1])}
        if len(counts) > 1:
            raise ValueError(f"{path}: the counts differ ({counts}); make it again ({INDEXING})")
        return index

    @classmethod
    def join(cls, parts: Iterable[tuple[Shard, np.ndarray]], *, class_names: list[str] | None) -> ShardIndex:
        """Return the index of shards, each with its images' offset, size and label (N, 3)."""
        shards, tables = zip(*parts, strict=True)
        offsets, sizes, labels = np.ascontiguousarray(np.concatenate(tables).T)
        return cls(shards=list(shards), offsets=offsets, sizes=sizes, labels=labels, class_names=class_names)


def index_name(split: str) -> str:
    """Return the name of a split's index beside its shards."""
    return f"{split}-index.safetensors"


def find_shards(folder: Path, split: str) -> list[str]:
    """Return the names of a split's shards, sorted, such as ``train-000000.tar`` or ``imagenet-train-0000.tar``.

    Raises:
        FileNotFoundError: If there is no such folder.
    """
    check_folder(folder)
    pattern = re.compile(rf"(?:.+[-_.])?(?:{SPLIT_NAMES[split]})(?:[-_.]\d+)?\.tar")
    return sorted(path.name for path in folder.iterdir() if pattern.fullmatch(path.name))


def read_class_names(folder: Path) -> list[str] | None:
    """Return the class names that ``classes.json`` beside the shards lists; None without that file.

    Raises:
        ValueError: If it holds no list of texts.
    """
    path = folder / CLASSES_FILE
    if not path.is_file():
        return None
    with contextlib.suppress(ValueError):
        names = json.loads(path.read_bytes())
        if isinstance(names, list) and all(isinstance(name, str) for name in names):
            return names
    raise ValueError(f"{path} is no JSON list of class names; correct it, or remove it")


def index_shard(folder: Path, name: str, *, has_sha256: bool = False) -> tuple[Shard, np.ndarray]:
    """Read a shard's headers and labels.

    Args:
        folder: Where it lies.
        name: The file.
        has_sha256: Read the whole file for its SHA-256, too.

    Returns:
        The shard, and each image's offset, size and label (N, 3), int64.

    Raises:
        ValueError: If it is damaged, or an image has no class index.
    """
    path = folder / name
    with path.open("rb") as file:
        table = np.array([sample for _, *sample in read_samples(file, path)], dtype=np.int64).reshape(-1, 3)
    sha256 = sha256_of(path) if has_sha256 else ""
    return Shard(name=name, num_images=len(table), num_bytes=path.stat().st_size, sha256=sha256), table


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def read_samples(file: BinaryIO, path: Path) -> Iterator[tuple[str, int, int, int]]:
    """Yield the name, offset, size and label of each image in a tar file.

    Raises:
        ValueError: If it is damaged, or an image has no class index.
    """
    key, image, labels = "", None, {}
    for member in _members(file, path):
        member_key, suffix = _split_name(member.name)
        if member_key != key:
            if image is not None:
                yield (key, image.offset_data, image.size, _label(labels, f"{path}:{key}"))
            key, image, labels = member_key, None, {}
        if is_image_name(f"x.{suffix}"):
            image = image or member
        elif suffix in LABEL_SUFFIXES and member.size <= MAX_LABEL_BYTES:
            position = file.tell()
            file.seek(member.offset_data)
            labels[suffix] = file.read(member.size)
            file.seek(position)
    if image is not None:
        yield (key, image.offset_data, image.size, _label(labels, f"{path}:{key}"))


def _members(file: BinaryIO, path: Path) -> Iterator[tarfile.TarInfo]:
    """Yield the regular files of an archive; unlike `tarfile`, take no damaged header for the archive's end."""
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            while (member := archive.next()) is not None:
                archive.members.clear()  # it would hold every header
                if member.isreg():
                    yield member
            end = archive.offset
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(_damaged(path, str(error))) from error
    file.seek(end)
    if file.read(tarfile.BLOCKSIZE).strip(b"\0"):
        raise ValueError(_damaged(path, f"no header at byte {end}"))


def _damaged(path: Path, cause: str) -> str:
    return f"{printable(path)} is damaged, or is no tar file ({cause}); fetch or make it again"


def _split_name(name: str) -> tuple[str, str]:
    """Return a member's sample and suffix: what stands before and after the first dot of the file's name."""
    path = PurePosixPath(name)
    stem, _, suffix = path.name.partition(".")
    return str(path.with_name(stem)) if stem else name, suffix.lower()


def _label(contents: dict[str, bytes], entry: str) -> int:
    """Return the class index that a sample's files give."""
    suffix = next((suffix for suffix in LABEL_SUFFIXES if suffix in contents), None)
    if suffix is None:
        raise ValueError(f"{printable(entry)}: no class index beside the image, in none of {listed(LABEL_SUFFIXES)}")
    text = contents[suffix]
    try:
        label = int(text) if text.strip().isdigit() else json.loads(text)
        if isinstance(label, dict):
            label = next(label[name] for name in LABEL_ENTRIES if name in label)
    except (ValueError, StopIteration):
        raise ValueError(
            f"{printable(entry)}.{suffix} gives no class index, but {text[:40]!r}; an object needs one of "
            f"{listed(LABEL_ENTRIES)}"
        ) from None
    return checked_label(label, entry=printable(f"{entry}.{suffix}"))
