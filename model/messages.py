"""Parts of messages: the first of many names, and what lies near a path that does not exist."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path

__all__ = ["listed", "neighbours"]


def listed(names: Sequence[object], limit: int = 5) -> str:
    """Return the first names, separated by commas, with an ellipsis where there are more."""
    return ", ".join(str(name) for name in names[:limit]) + (", ..." if len(names) > limit else "")


def neighbours(path: Path) -> str:
    """Return the names next to a missing file that are nearest to its own, or that its folder is empty or missing."""
    if not path.parent.is_dir():
        return f"there is no folder {path.parent} either: check the path"
    names = [entry.name for entry in path.parent.iterdir()]
    near = difflib.get_close_matches(path.name, names, n=3, cutoff=0.0)
    return f"the nearest in {path.parent}: {', '.join(near)}" if near else f"the folder {path.parent} is empty"
