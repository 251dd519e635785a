"""The images of class folders, as one search found them, and kept until a folder changes."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from model.pictures import image_suffixes

from .base import BytesTable
from .cache import Cache, load_arrays, save_arrays

__all__ = ["Listing", "list_classes"]

logger = logging.getLogger(__name__)

FORMAT = "mobilemamba-listing-1"
MIN_IMAGES = 10_000  # fewer are found at once
TICK_NS = 2_000_000_000  # a folder's time of change may be that coarse


@dataclass(frozen=True, kw_only=True)
class Listing:
    """What a search of class folders found.

    Attributes:
        class_names: The class folders.
        names: Path of each image (N,).
        labels: Class index per image (N,), int64.
        folders: Time of the last change of each folder that was searched, in ns, by its path.
        remarks: What to log, with the level.
    """

    class_names: list[str]
    names: BytesTable
    labels: np.ndarray
    folders: dict[str, int]
    remarks: list[tuple[int, str]]

    def report(self) -> None:
        """Log the remarks."""
        for level, remark in self.remarks:
            logger.log(level, "%s", remark)


def list_classes(
    folder: Path, search: Callable[[], Listing], *, cache: Cache | None
) -> tuple[list[str], BytesTable, np.ndarray]:
    """Return class names, image names and labels below a folder, from the cache where no folder has changed.

    Adding, removing or renaming a file or folder changes the time of the folder that holds it. Several processes may
    list one folder at once: the file in the cache appears when it is whole.

    Args:
        folder: That of the class folders.
        search: Finds them.
        cache: Where a list is kept; nowhere when None.

    Raises:
        ValueError: As ``search`` does.
    """
    file = None if cache is None else _file(folder, cache)
    listing = None if file is None else _load(file, folder)
    if listing is None:
        start = time.time_ns()
        listing = search()
        is_settled = max(listing.folders.values()) < start - TICK_NS  # a change since would show in the time
        if file is not None and is_settled and len(listing.labels) >= MIN_IMAGES:
            _save(file, listing)
    listing.report()
    return listing.class_names, listing.names, listing.labels


def _file(folder: Path, cache: Cache) -> Path:
    source = (os.fsencode(folder.resolve()), str(folder), sorted(image_suffixes()))
    return cache.file("listings", source, ".safetensors")


def _save(file: Path, listing: Listing) -> None:
    arrays = {"names": listing.names.buffer, "starts": listing.names.starts, "labels": listing.labels}
    metadata = {
        "format": FORMAT,
        "content": json.dumps([listing.class_names, listing.folders, listing.remarks]),
    }
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_arrays(file, arrays, metadata)
    except OSError as error:
        logger.info("%s cannot be written (%s): each start lists the files", file, error)


def _load(file: Path, folder: Path) -> Listing | None:
    """Return the listing in a file if it still holds."""
    with contextlib.suppress(ValueError, KeyError, OSError):
        arrays, metadata = load_arrays(file)
        if metadata["format"] == FORMAT:
            class_names, folders, remarks = json.loads(metadata["content"])
            if all((folder / name).stat().st_mtime_ns == changed for name, changed in folders.items()):
                names = BytesTable.from_arrays(arrays["names"], arrays["starts"])
                remarks = [(level, remark) for level, remark in remarks]
                return Listing(
                    class_names=class_names, names=names, labels=arrays["labels"], folders=folders, remarks=remarks
                )
    return None
