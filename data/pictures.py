"""Images without labels, named by a path: one file, a folder with its subfolders, or a glob."""

from __future__ import annotations

import fnmatch
import glob
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

from model.messages import neighbours
from model.pictures import is_image_name

from .base import FileDataset, index_names
from .files import ImageSearch, left_out
from .images import MAX_PIXELS

__all__ = ["Pictures"]

ENTRY = "predict.input"
ANY_DEPTH = "**"

logger = logging.getLogger(__name__)


class Pictures(FileDataset):
    """The images that a path names, in the order of their names; all of class 0, which means nothing.

    Args:
        place: A file, whatever its extension, a folder, or a glob (``**`` for any depth). ``~`` is the home folder.
        loader_type: Who decodes the images.
        max_pixels: Larger images are unreadable.
        mode: Of the images, by Pillow's name.

    Raises:
        ValueError: If there is no such file or folder, no image in it, or a folder in it cannot be listed.
    """

    def __init__(
        self, place: str, *, loader_type: str = "pil", max_pixels: int = MAX_PIXELS, mode: str = "RGB"
    ) -> None:
        path = Path(place).expanduser()
        folder, names = (path, _in_folder(path)) if path.is_dir() else (Path(), _files(path, place))
        super().__init__(
            folder,
            names,
            [0] * len(names),
            source=path,
            class_names=index_names(1),
            has_all_classes=False,
            loader_type=loader_type,
        )
        self.max_pixels, self.mode = max_pixels, mode


def _in_folder(folder: Path) -> list[str]:
    search = ImageSearch(folder)
    names = search.images()
    search.report()
    if not names:
        raise ValueError(
            f"{ENTRY}={folder}: no image in this folder and its subfolders ({len(search.others)} other files)"
        )
    return names


def _files(path: Path, place: str) -> list[str]:
    if path.is_file():
        return [str(path)]
    if path.exists():
        raise ValueError(f"{ENTRY}={place}: a pipe or device, not an image or a folder")
    if glob.escape(place) == place:
        raise ValueError(f"{ENTRY}={place}: there is no such file or folder; {neighbours(path)}")
    matches = sorted(set(_matches(path)))
    names = [name for name in matches if is_image_name(Path(name).name) and Path(name).is_file()]
    others = [Path(name) for name in sorted(set(matches).difference(names)) if not Path(name).is_dir()]
    if others:
        logger.info("%s=%s: %s", ENTRY, place, left_out(others))
    if not names:
        raise ValueError(
            f"{ENTRY}={place}: no image has such a name ({len(matches)} others have); in quotes, the shell does "
            "not expand the pattern"
        )
    return names


def _matches(pattern: Path) -> Iterator[str]:
    """Yield what a glob matches. Below ``**`` each real folder is searched once, unlike in Python's glob."""
    parts = pattern.parts
    depth = parts.index(ANY_DEPTH) if ANY_DEPTH in parts else len(parts)
    bases = glob.glob(str(Path(*parts[:depth])))  # noqa: PTH207 - Path.glob takes no absolute pattern
    if depth == len(parts):
        yield from bases
        return
    for base in filter(Path.is_dir, map(Path, bases)):
        search = ImageSearch(base)
        found = [base / name for name in search.images()] + search.others
        search.report_links()
        yield from (str(path) for path in found if _fits(path.relative_to(base).parts, parts[depth:]))


def _fits(names: Sequence[str], patterns: Sequence[str]) -> bool:
    """Return whether the parts of a path match those of a pattern."""
    if not patterns or not names:
        return not names and all(pattern == ANY_DEPTH for pattern in patterns)
    if patterns[0] == ANY_DEPTH:
        return any(_fits(names[start:], patterns[1:]) for start in range(len(names) + 1))
    return fnmatch.fnmatchcase(names[0], patterns[0]) and _fits(names[1:], patterns[1:])
