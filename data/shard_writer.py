"""Writes a split as tar shards that WebDataset reads too, and checks them."""

from __future__ import annotations

import hashlib
import io
import json
import re
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import IO

import numpy as np
import torch
from tqdm import tqdm

from model.files import remove_leftovers, replacing
from model.pictures import is_image_name

from .base import ImageDataset
from .images import decode
from .lmdb_folder import ImageFolderLMDB
from .shard_cache import SHA256_SUFFIX
from .shard_index import CLASSES_FILE, ShardIndex, index_name, index_shard, read_samples, sha256_of
from .shards import Shards

__all__ = ["image_suffix", "save_index", "verify_shards", "write_shards"]

NUMBER = re.compile(r"(\d{9,})-")  # of the image in the source, at the start of its name in a shard
LONGEST_STEM = 60
SUFFIXES = {b"\xff\xd8\xff": ".jpg", b"\x89PNG": ".png", b"BM": ".bmp", b"RIFF": ".webp", b"II": ".tif", b"MM": ".tif"}


def image_suffix(data: bytes, *, default: str) -> str:
    """Return the extension that goes with an image file's content."""
    return next((suffix for magic, suffix in SUFFIXES.items() if data.startswith(magic)), default)


def write_shards(
    dataset: ImageDataset, out: Path, *, split: str, images_per_shard: int, seed: int, is_forced: bool = False
) -> ShardIndex:
    """Write a split to ``<out>/<split>-000000.tar`` and so on, with the index that `Shards` reads.

    Training images are shuffled, test images keep their order. Each shard is read back before it appears. Shards that
    an earlier call wrote before it was interrupted are checked and kept.

    Args:
        dataset: The split.
        out: The folder.
        split: ``train`` or ``val``.
        images_per_shard: In all shards but the last.
        seed: Of the shuffle.
        is_forced: Write all shards again.

    Returns:
        The index.

    Raises:
        ValueError: If an image cannot be read, or a shard is there that holds other images.
        OSError: If the disk is full or the folder cannot be written to.
    """
    out.mkdir(parents=True, exist_ok=True)
    order = np.arange(len(dataset))
    if split == "train":
        order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed)).numpy()
    parts = []
    with tqdm(total=len(dataset), desc=f"{split}: writing shards", unit=" images") as bar:
        for number, start in enumerate(range(0, len(order), images_per_shard)):
            path = out / f"{split}-{number:06d}.tar"
            indices = order[start : start + images_per_shard].tolist()
            if path.exists() and not is_forced:
                _check_written(dataset, path, indices)
            else:
                _write(dataset, path, indices)
            parts.append(index_shard(out, path.name, has_sha256=True))
            bar.update(len(indices))
    index = ShardIndex.join(parts, class_names=dataset.class_names if dataset.has_all_classes else None)
    save_index(out, split, index)
    if index.class_names is not None:
        with replacing(out / CLASSES_FILE) as aside:
            aside.write_text(json.dumps(index.class_names, indent=1) + "\n")
    return index


def save_index(folder: Path, split: str, index: ShardIndex) -> None:
    """Write an index beside its shards, and its SHA-256, by which a reader over HTTP sees that it is still the same."""
    path = folder / index_name(split)
    index.save(path)
    with replacing(path.with_name(path.name + SHA256_SUFFIX)) as aside:
        aside.write_text(f"{sha256_of(path)}  {path.name}\n")


def verify_shards(
    root: Path, *, split: str, against: ImageDataset | None = None, decodes: bool = False
) -> tuple[int, list[str]]:
    """Read every shard and image of a split and check it.

    Args:
        root: Folder of the shards.
        split: ``train`` or ``val``.
        against: The data set that they were written from, to agree with byte by byte.
        decodes: Decode the images, too.

    Returns:
        Number of images, and what is wrong.

    Raises:
        ValueError: If a shard is missing or the index is that of others.
    """
    dataset = Shards(root, split=split)
    problems = [
        f"{root / shard.name}: the content differs from what was written (SHA-256)"
        for shard in tqdm(dataset.index.shards, desc=f"{split}: checking shards")
        if shard.sha256 not in ("", sha256_of(root / shard.name))
    ]
    if against is not None and len(against) != len(dataset):
        problems.append(f"{dataset.source} hold {len(dataset)} images, {against.source} {len(against)}")
        against = None
    for index in tqdm(range(len(dataset)), desc=f"{split}: checking", unit=" images"):
        problems += _problems(dataset, index, against, decodes=decodes)
    dataset.close()
    return len(dataset), problems


def _problems(dataset: Shards, index: int, against: ImageDataset | None, *, decodes: bool) -> Iterator[str]:
    name = dataset.name(index)
    try:
        data = dataset.read_bytes(index)
        if decodes:
            decode(data, name=name, loader_type="pil")
        if against is not None:
            number = NUMBER.match(name.rpartition(":")[2])
            if number is None or int(number[1]) >= len(against):
                yield f"{name}: names no image of {against.source}"
            elif _record(against, int(number[1])) != (data, int(dataset.index.labels[index])):
                yield f"{name}: the image or its class differs from {against.name(int(number[1]))}"
    except ValueError as error:
        yield str(error)


def _record(dataset: ImageDataset, index: int) -> tuple[bytes, int]:
    """Return an encoded image and its class index."""
    if isinstance(dataset, ImageFolderLMDB):
        return dataset.file.record(index)
    return dataset.read_bytes(index), int(dataset.labels[index])


def _key(dataset: ImageDataset, index: int) -> str:
    """Return an image's name in a shard: its number, for it to be unique, and what its name begins with."""
    stem = PurePosixPath(dataset.name(index)).stem
    return f"{index:09d}-{re.sub(r'[^A-Za-z0-9_-]', '_', stem)[:LONGEST_STEM]}"


def _check_written(dataset: ImageDataset, path: Path, indices: Sequence[int]) -> None:
    with path.open("rb") as file:
        found = [key for key, *_ in read_samples(file, path)]
    if found != [_key(dataset, index) for index in indices]:
        raise ValueError(f"{path} holds other images than would be written there; add --force if it may be replaced")


def _write(dataset: ImageDataset, path: Path, indices: Sequence[int]) -> None:
    remove_leftovers(path.parent, path.name)
    with replacing(path) as aside:
        with aside.open("wb") as file:
            hashed = _HashedFile(file)
            with tarfile.open(fileobj=hashed, mode="w:", format=tarfile.USTAR_FORMAT) as archive:
                for index in indices:
                    data, label = _record(dataset, index)
                    key = _key(dataset, index)
                    _add(archive, key + _suffix(data, dataset.name(index)), data)
                    _add(archive, f"{key}.cls", str(label).encode())
        if sha256_of(aside) != hashed.digest.hexdigest():
            raise OSError(f"{path}: what was read back differs from what was written; check the disk")


def _suffix(data: bytes, name: str) -> str:
    suffix = PurePosixPath(name).suffix.lower()
    if suffix in (".jpeg", ".jfif"):
        return ".jpg"
    return suffix if is_image_name(f"x{suffix}") else image_suffix(data, default=".jpg")


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)  # owner and time stay 0, so that the same images give the same shard
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


class _HashedFile(io.RawIOBase):
    """Hands on what is written, and keeps its SHA-256."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.digest = hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        return self.file.write(data)

    def tell(self) -> int:
        return self.file.tell()
