"""The folder on this machine for what can be made or fetched again: lists of files, indices, downloaded shards."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from model.files import replacing

__all__ = ["Cache", "load_arrays", "save_arrays"]


@dataclass(frozen=True, kw_only=True)
class Cache:
    """Where what is cached lies.

    Attributes:
        folder: Below the folder of `torch.hub` unless ``data.cache`` names another.
        max_bytes: Downloaded shards that are kept, of all data sets together.
    """

    folder: Path
    max_bytes: int

    @classmethod
    def create(cls, folder: str = "", *, max_gb: float = 200.0) -> Cache:
        """Return the cache that a configuration describes; nothing is made on the disk yet."""
        path = Path(folder).expanduser() if folder else Path(torch.hub.get_dir()) / "mobilemamba"
        return cls(folder=path, max_bytes=int(max_gb * 1e9))

    def file(self, kind: str, source: object, suffix: str) -> Path:
        """Return the file of one kind for a source, such as a folder or an address."""
        return (
            self.folder
            / kind
            / f"{hashlib.sha256(str(source).encode(errors='surrogateescape')).hexdigest()[:24]}{suffix}"
        )


def save_arrays(path: Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Write arrays as a safetensors file, which appears when it is whole.

    Raises:
        OSError: If it cannot be written.
    """
    tensors = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
    with replacing(path) as aside:
        save_file(tensors, aside, metadata=dict(metadata))
        aside.chmod(0o644)  # safetensors lets nobody else read it


def load_arrays(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Return arrays and metadata; the arrays are mapped, so that processes that read one file share its memory.

    Raises:
        ValueError: If it is no safetensors file, or is cut short.
        OSError: If it cannot be read.
    """
    try:
        with contextlib.ExitStack() as stack:
            file = stack.enter_context(safe_open(path, framework="pt"))
            return {name: file.get_tensor(name).numpy() for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}); remove it, it is made again") from error
