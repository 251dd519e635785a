"""Parts of messages: names that any terminal can show, the first of many, those near a path that does not exist."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path

__all__ = ["check_folder", "listed", "neighbours", "printable"]


def printable(text: object) -> str:
    r"""Return a text in one line of visible characters; others become escapes such as ``\x1b`` and ``\n``.

    File and class names may hold anything: control characters that command a terminal, line ends that forge a line of
    the log, marks that turn the direction of writing, bytes that are not UTF-8.
    """
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode("ascii")
        for character in str(text)
    )


def listed(names: Sequence[object], limit: int = 5) -> str:
    """Return the first names, separated by commas, with an ellipsis where there are more."""
    return ", ".join(map(printable, names[:limit])) + (", ..." if len(names) > limit else "")


def neighbours(path: Path) -> str:
    """Return the names next to a missing file that are nearest to its own, or that its folder is empty or missing."""
    if not path.parent.is_dir():
        return f"there is no folder {path.parent} either: check the path"
    names = [entry.name for entry in path.parent.iterdir()]
    near = difflib.get_close_matches(path.name, names, n=3, cutoff=0.0)
    return f"the nearest in {path.parent}: {listed(near)}" if near else f"the folder {path.parent} is empty"


def check_folder(folder: Path) -> None:
    """Raise a FileNotFoundError, with the nearest names, if there is no such folder."""
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}; {neighbours(folder)}")
