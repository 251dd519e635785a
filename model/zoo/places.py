"""The places of checkpoints on this machine."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

import torch

from .entries import Entry

__all__ = ["local_path", "relative_path"]

ROOT = Path(__file__).resolve().parents[2]
FOLDER = "weights"


def local_path(entry: Entry) -> Path:
    """Return where a checkpoint belongs, whether or not it is there.

    In the repository this is below ``weights/``; for an installed package, below the folder of `torch.hub`. A
    checkpoint that a user's own list names lies relative to that list.
    """
    if entry.folder is not None:
        return entry.folder / entry.path
    return _checkpoints_folder() / relative_path(entry)


def relative_path(entry: Entry) -> PurePosixPath:
    """Return where a checkpoint lies inside ``weights/``, here and on mirrors."""
    path = PurePosixPath(entry.path)
    return path.relative_to(FOLDER) if path.is_relative_to(FOLDER) else path


def _checkpoints_folder() -> Path:
    if (ROOT / FOLDER / "README.md").is_file():
        return ROOT / FOLDER
    return Path(torch.hub.get_dir()) / "checkpoints" / "mobilemamba"
