"""Images without labels, named by a path: one file, a folder with its subfolders, or a glob."""

from __future__ import annotations

import glob
from pathlib import Path

from model.messages import neighbours

from .base import FileDataset, index_names
from .folders import images_below
from .images import is_image_name

__all__ = ["Pictures"]

ENTRY = "predict.input"


class Pictures(FileDataset):
    """The images that a path names, in the order of their names; all of class 0, which means nothing.

    Args:
        place: A file, whatever its extension, a folder, or a glob (``**`` for any depth). ``~`` is the home folder.
        loader_type: Who decodes the images.

    Raises:
        ValueError: If there is no such file or folder, or no image in it.
    """

    def __init__(self, place: str, *, loader_type: str = "pil") -> None:
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


def _in_folder(folder: Path) -> list[str]:
    others: list[Path] = []
    names = images_below(folder, ".", others)
    if not names:
        raise ValueError(f"{ENTRY}={folder}: no image in this folder and its subfolders ({len(others)} other files)")
    return names


def _files(path: Path, place: str) -> list[str]:
    if path.is_file():
        return [str(path)]
    if glob.escape(place) == place:
        raise ValueError(f"{ENTRY}={place}: there is no such file or folder; {neighbours(path)}")
    matches = sorted(glob.glob(str(path), recursive=True))  # noqa: PTH207 - Path.glob takes no absolute pattern
    names = [name for name in matches if is_image_name(Path(name).name) and Path(name).is_file()]
    if not names:
        raise ValueError(
            f"{ENTRY}={place}: no image has such a name ({len(matches)} others have); in quotes, the shell does "
            "not expand the pattern"
        )
    return names
