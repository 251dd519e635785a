"""Data sets with their labels in JSON files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

from model.messages import listed

from .base import FileDataset, index_names
from .files import file_name
from .folders import best_folder, checked_label

__all__ = ["INAT18CLS", "INAT19CLS", "CustomImageDataset", "IN22KDataset"]


class _LabelledFiles(FileDataset):
    """Files with class indices, and no class names."""

    def __init__(
        self,
        folders: Sequence[Path],
        pairs: Iterable[tuple[str, Any]],
        *,
        split: str,
        source: Path,
        loader_type: str,
    ) -> None:
        names, labels = [], []
        for name, label in pairs:
            names.append(file_name(name))
            labels.append(checked_label(label, entry=f"{source}, {name!r}"))
        if not names:
            raise ValueError(f"{source} names no image; fill it, or give data.root another folder")
        super().__init__(
            best_folder(folders, names, source),
            names,
            labels,
            source=source,
            class_names=index_names(max(labels) + 1),
            has_all_classes=split == "train",
            loader_type=loader_type,
        )


class IN22KDataset(_LabelledFiles):
    """Images named by a JSON list of ``[path, label]``, as ImageNet-22K comes.

    The list is ``<root>/<split>.json``, or ``<root>/ILSVRC2011fall_whole_map_<split>.txt``; its paths are relative to
    the root or to the split's folder.

    Args:
        root: The data set's folder.
        split: ``train`` or ``val``.
        loader_type: Who decodes the images.

    Raises:
        ValueError: If the list is missing, is no such list, or names files that are not there.
    """

    def __init__(self, root: Path, *, split: str, loader_type: str = "pil") -> None:
        source = _first_file(root / f"{split}.json", root / f"ILSVRC2011fall_whole_map_{split}.txt")
        entries = _read_json(source, list)
        for position, entry in enumerate(entries):
            if not (isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str)):
                raise ValueError(f"{source}, entry {position}: expected [path, label], got {entry!r}")
        super().__init__((root, root / split), entries, split=split, source=source, loader_type=loader_type)


class CustomImageDataset(_LabelledFiles):
    """Images in ``<root>/images/``, with labels in ``<root>/<split>.json``, an object of name -> class index.

    Args:
        root: The data set's folder.
        split: ``train`` or ``val``.
        loader_type: Who decodes the images.

    Raises:
        ValueError: If a file is missing, is no such object, or names files that are not there.
    """

    def __init__(self, root: Path, *, split: str, loader_type: str = "pil") -> None:
        source = _first_file(root / f"{split}.json")
        labels = _read_json(source, dict)
        super().__init__((root / "images",), labels.items(), split=split, source=source, loader_type=loader_type)


class _INaturalist(FileDataset):
    """iNaturalist as its competitions published it.

    ``<root>/<split><year>.json`` holds ``images`` (id, file_name), ``annotations`` (image_id, category_id) and
    ``categories`` (id, name, ...); file names are relative to the root. Classes are numbered in the order of the
    category ids.

    Args:
        root: The data set's folder.
        split: ``train`` or ``val``.
        loader_type: Who decodes the images.
        category: The field of a category that makes the class: ``name`` for species, or a coarser one, as
            ``supercategory``.

    Raises:
        ValueError: If the file is missing, is laid out otherwise, or names files that are not there.
    """

    year: ClassVar[int]

    def __init__(self, root: Path, *, split: str, loader_type: str = "pil", category: str = "name") -> None:
        source = _first_file(root / f"{split}{self.year}.json")
        content = _read_json(source, dict)
        try:
            class_of, class_names = _classes(content["categories"], category)
            category_of = {entry["image_id"]: entry["category_id"] for entry in content["annotations"]}
            names = [file_name(entry["file_name"]) for entry in content["images"]]
            labels = [class_of[category_of[entry["id"]]] for entry in content["images"]]
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"{source}: no entry {error}; expected images (id, file_name), annotations (image_id, category_id) "
                f"and categories (id, {category})"
            ) from error
        if not names:
            raise ValueError(f"{source} names no image; fetch it again")
        super().__init__(
            best_folder((root,), names, source),
            names,
            labels,
            source=source,
            class_names=class_names,
            has_all_classes=True,
            loader_type=loader_type,
        )


class INAT18CLS(_INaturalist):
    """iNaturalist 2018, 8,142 species: ``train2018.json``, ``val2018.json``, images in ``train_val2018/``."""

    year = 2018


class INAT19CLS(_INaturalist):
    """iNaturalist 2019, 1,010 species: ``train2019.json``, ``val2019.json``, images in ``train_val2019/``."""

    year = 2019


def _classes(categories: list[dict[str, Any]], field: str) -> tuple[dict[int, int], list[str]]:
    """Return the class index of each category id, and the class names."""
    ordered = sorted(categories, key=lambda category: category["id"])
    index_of = {name: index for index, name in enumerate(dict.fromkeys(str(category[field]) for category in ordered))}
    return {category["id"]: index_of[str(category[field])] for category in ordered}, list(index_of)


def _first_file(*paths: Path) -> Path:
    for path in paths:
        if path.is_file():
            return path
    names = " or ".join(path.name for path in paths)
    found = listed(sorted(path.name for path in paths[0].parent.iterdir())) or "nothing"
    raise ValueError(f"{paths[0].parent} holds no {names}, but {found}; point data.root at the folder that does")


def _read_json(path: Path, kind: type) -> Any:
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON file, or is cut short: {error}") from error
    if not isinstance(content, kind):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected a {kind.__name__}")
    return content
