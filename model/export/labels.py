"""The classes of pictures that lie in a folder for each class."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

__all__ = ["labels_of"]


def labels_of(files: Sequence[Path], folder: Path, classes: Sequence[str] = ()) -> list[int] | None:
    """Return the class of each picture by the folder it lies in; None where these are not folders of classes.

    Args:
        files: Pictures in and below ``folder``.
        folder: Has a folder for each class.
        classes: Names of the classes in order; by default the folders' names in alphabetical order.
    """
    names = [file.relative_to(folder).parts[0] if file.parent != folder else None for file in files]
    known = list(classes) or sorted({name for name in names if name is not None})
    if not all(name in known for name in names):
        return None
    return [known.index(name) for name in names if name is not None]
