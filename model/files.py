"""Files and folders that appear whole: written aside, flushed to the disk, then renamed."""

from __future__ import annotations

import contextlib
import glob
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

__all__ = [
    "SUFFIX",
    "move_into_place",
    "remove_leftovers",
    "replacing",
    "replacing_folder",
    "save_safetensors",
    "sync_folder",
]

SUFFIX = ".part"  # of everything that is not whole yet


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield the name of a file to write; at the end it replaces ``path`` at once, after an error it is removed."""
    aside = _aside(path)
    try:
        yield aside
        with aside.open("rb+") as file:
            os.fsync(file.fileno())
        move_into_place(aside, path)
    finally:
        with contextlib.suppress(OSError):  # it must not hide what went wrong before
            aside.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder to fill; at the end it replaces ``path``, after an error it is removed.

    What an earlier call for the same path left when it was killed is removed first, so only one process may fill a
    path. Parents are made if need be.
    """
    remove_leftovers(path.parent, path.name)
    aside = _aside(path)
    aside.mkdir(parents=True)
    try:
        yield aside
        if path.exists():
            shutil.rmtree(path)
        move_into_place(aside, path)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _aside(path: Path) -> Path:
    # Random, since processes on several machines may write to one folder, and have the same number there.
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}{SUFFIX}")


def move_into_place(aside: Path, path: Path) -> None:
    """Rename a file or folder that is whole."""
    aside.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make a rename in the folder outlast a power cut, where the file system has a way to."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def remove_leftovers(folder: Path, name: str | None = None, *, suffixes: Sequence[str] = (SUFFIX,)) -> list[Path]:
    """Remove and return what writers that were killed left in a folder, of one name or of all.

    Only for a process that knows that no other is writing there.
    """
    pattern = "*" if name is None else glob.escape(name)
    leftovers = [leftover for suffix in suffixes for leftover in folder.glob(f".{pattern}.*{suffix}")]
    for leftover in leftovers:
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)
    return leftovers


def save_safetensors(weights: Mapping[str, Tensor], target: Path) -> None:
    """Write a safetensors file aside, then rename it. Tensors may share memory or lie in it in any order."""
    contents = {name: value.detach().clone(memory_format=torch.contiguous_format) for name, value in weights.items()}
    with replacing(target) as aside:
        safetensors.torch.save_file(contents, aside, metadata={"format": "pt"})
