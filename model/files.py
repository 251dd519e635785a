"""Files that last."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

__all__ = ["replacing", "save_safetensors", "sync_folder"]


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a file aside, to be written; it takes the place of ``path`` at once at the end, or goes on an error."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield aside
        with aside.open("rb+") as file:
            os.fsync(file.fileno())
        aside.replace(path)
        sync_folder(path.parent)
    finally:
        aside.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make a rename in the folder outlast a power cut, where the file system has a way to."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def save_safetensors(weights: Mapping[str, Tensor], target: Path) -> None:
    """Write a safetensors file aside, then rename it. Tensors may share memory or lie in it in any order."""
    contents = {name: value.detach().clone(memory_format=torch.contiguous_format) for name, value in weights.items()}
    with replacing(target) as aside:
        safetensors.torch.save_file(contents, aside, metadata={"format": "pt"})
