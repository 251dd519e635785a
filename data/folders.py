"""Class folders, or lists of files, below ``train/`` and ``val/``."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath

import numpy as np

from model.messages import listed
from model.pictures import is_image_name

from .base import BytesTable, FileDataset, index_names
from .cache import Cache
from .files import ImageSearch, class_folders, file_name
from .listing import Listing, list_classes

__all__ = ["DefaultCLS", "best_folder", "checked_label"]

NUM_PROBES = 64
LABEL = re.compile("[0-9]{1,100}")
MAX_CLASSES = 1_000_000  # a label beyond is a time stamp, an id or the like


class DefaultCLS(FileDataset):
    """A folder per class under ``<root>/<split>/``, or the files that ``<root>/<split>.txt`` lists.

    Class folders are numbered in the order of their names. A list has lines ``path class-index``, the path relative to
    the root or to the split's folder; the path may hold spaces.

    Args:
        root: The data set's folder.
        split: ``train`` or ``val``.
        loader_type: Who decodes the images.
        cache: Where the list of a large set's files is kept; nowhere when None.

    Raises:
        ValueError: If a folder is missing, empty or laid out otherwise, or a line is no ``path class-index``.
    """

    def __init__(self, root: Path, *, split: str, loader_type: str = "pil", cache: Cache | None = None) -> None:
        list_file = root / f"{split}.txt"
        if list_file.is_file():
            names, labels = _read_list(list_file)
            class_names, has_all_classes = _classes_of_list(root, split, names, labels, list_file)
            source, folder = list_file, best_folder((root, root / split), names, list_file)
        else:
            source = folder = root / split
            class_names, names, labels = list_classes(root / split, lambda: _scan(root, split), cache=cache)
            has_all_classes = True
        super().__init__(
            folder,
            names,
            labels,
            source=source,
            class_names=class_names,
            has_all_classes=has_all_classes,
            loader_type=loader_type,
        )


def checked_label(label: object, *, entry: str) -> int:
    """Return ``label`` if it can be a class index.

    Raises:
        ValueError: If it is no integer from 0 on, or too large for one; ``entry`` names the place.
    """
    if not isinstance(label, int) or isinstance(label, bool) or label < 0:
        raise ValueError(f"{entry}: the label is {label!r}, expected a class index, 0 or more")
    if label >= MAX_CLASSES:
        raise ValueError(f"{entry}: {label} is no class index, the highest is {MAX_CLASSES - 1}; is it another column?")
    return label


def best_folder(folders: Sequence[Path], names: Sequence[str], source: Path) -> Path:
    """Return the folder in which the named files lie, judged by some of them.

    Raises:
        ValueError: If they lie in none.
    """
    probes = names[:: max(1, len(names) // NUM_PROBES)]
    num_found = {folder: sum(_is_file(folder / name) for name in probes) for folder in folders}
    best = max(folders, key=num_found.__getitem__)
    if num_found[best] == 0:
        where = " nor in ".join(str(folder) for folder in folders)
        raise ValueError(f"{source}: the files it names are not in {where}: {listed(probes)}")
    return best


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        return False


def _scan(root: Path, split: str) -> Listing:
    folder = root / split
    class_names = class_folders(folder)
    if not class_names:
        raise ValueError(_no_classes_message(root, split))
    num_images: list[int] = []
    search = ImageSearch(folder, class_names)
    search.others += [path for path in sorted(folder.iterdir()) if path.is_file()]

    def encoded_names() -> Iterator[bytes]:
        for class_name in class_names:
            images = search.images(class_name)
            num_images.append(len(images))
            yield from map(os.fsencode, images)

    names = BytesTable(encoded_names())
    empty = [name for name, count in zip(class_names, num_images, strict=True) if count == 0]
    listing = Listing(
        class_names=class_names,
        names=names,
        labels=np.repeat(np.arange(len(class_names)), num_images),
        folders=search.folders,
        remarks=search.remarks(),
    )
    if empty:
        listing.report()
        raise ValueError(
            f"{folder}: {len(empty)} of {len(class_names)} class folders hold no image ({listed(empty)}); "
            "add their images, or remove these folders from train/ and val/ alike"
        )
    return listing


def _no_classes_message(root: Path, split: str) -> str:
    folder = root / split
    if not folder.is_dir():
        found = listed(class_folders(root)) or "none"
        return (
            f"{folder} does not exist; data.root must hold a folder per class below train/ and val/, or train.txt and "
            f"val.txt (folders in {root}: {found}); `python -m data.prepare split` makes both from plain class folders"
        )
    num_images = sum(is_image_name(path.name) for path in folder.iterdir())
    if num_images == 0:
        return f"{folder} is empty: it has neither class folders nor images; fill it, or give data.root another folder"
    return (
        f"{folder} holds {num_images} images but no class folder; move each image into a folder named after its class "
        f"({folder}/<class>/<image>), or name them in {root / split}.txt, one `path class-index` a line"
    )


def _read_list(list_file: Path) -> tuple[list[str], list[int]]:
    names: list[str] = []
    labels: list[int] = []
    with list_file.open(encoding="utf-8-sig", errors="surrogateescape") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            name, _, label = line.strip().replace("\t", " ").rpartition(" ")
            if not name or not LABEL.fullmatch(label):
                raise ValueError(f"{list_file}, line {number}: expected `path class-index`, got {line.strip()!r}")
            names.append(file_name(name.strip()))
            labels.append(checked_label(int(label), entry=f"{list_file}, line {number}"))
    if not names:
        raise ValueError(f"{list_file} is empty; list the images, one `path class-index` a line, or remove the file")
    return names, labels


def _classes_of_list(
    root: Path, split: str, names: Sequence[str], labels: Sequence[int], list_file: Path
) -> tuple[list[str], bool]:
    """Return the class names that go with a list, and whether these are all classes."""
    train_folders = class_folders(root / "train")
    if split == "train" or (root / "train.txt").is_file() or not train_folders:
        return _parent_names(names, labels), split == "train"
    # Training numbers the classes by their folders; a list with other numbers would be scored wrong unnoticed.
    index_of = {name: index for index, name in enumerate(train_folders)}
    for name, label in zip(names, labels, strict=True):
        parent = PurePath(name).parent.name
        if index_of.get(parent, label) != label:
            raise ValueError(
                f"{list_file}: {name} has class index {label}, but the class folders in {root / 'train'} make it "
                f"{index_of[parent]}; number the classes by the order of these names, from 0"
            )
    return train_folders, True


def _parent_names(names: Sequence[str], labels: Sequence[int]) -> list[str]:
    """Return the folder that each class lies in, or plain numbers where folders and classes do not correspond."""
    pairs = {(label, PurePath(name).parent.name) for name, label in zip(names, labels, strict=True)}
    num_classes = max(labels) + 1
    folder_of = dict(pairs)
    is_named = len(pairs) == num_classes == len(folder_of) == len(set(folder_of.values()) - {""})
    return [folder_of[label] for label in range(num_classes)] if is_named else index_names(num_classes)
