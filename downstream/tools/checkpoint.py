"""Checkpoints as mmengine writes them, read without running anything of what they hold."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import torch
from mmengine.logging import HistoryBuffer
from mmengine.runner import CheckpointLoader

from model.checkpoint import read_checkpoint, select_state_dict

from .errors import InputError

__all__ = ["read_weights", "use_safe_loading"]


def use_safe_loading() -> None:
    """Let mmengine read checkpoints by `read_weights`; its own runs what a file holds where the safe one fails."""
    CheckpointLoader.register_scheme("", loader=load_from_disk, force=True)
    CheckpointLoader.register_scheme(("http://", "https://"), loader=load_from_internet, force=True)


def load_from_disk(filename: str, map_location: Any = None) -> dict[str, Any]:
    """Read for mmengine, which moves things where they belong by itself."""
    return read_weights(filename)


def load_from_internet(filename: str, map_location: Any = None) -> dict[str, Any]:
    """Refuse for mmengine.

    Raises:
        InputError: Always.
    """
    raise InputError(f"{filename} is not on this machine: download it and give the file")


def read_weights(path: str) -> dict[str, Any]:
    """Read a checkpoint, its weights under ``state_dict``, whatever layout they had.

    Beside tensors and plain values, it may hold mmengine's log histories, which are made of numpy arrays of numbers.

    Raises:
        InputError: The file is missing, unreadable, or holds code.
    """
    try:
        with torch.serialization.safe_globals(_history_globals()):
            checkpoint = read_checkpoint(path)
        weights, _ = select_state_dict(checkpoint, ema=False, origin=path)
    except (ValueError, OSError) as error:
        raise InputError(str(error)) from error
    is_bare = not any(isinstance(value, dict) for value in checkpoint.values())
    return {"state_dict": weights} if is_bare else {**checkpoint, "state_dict": weights}


def _history_globals() -> list[Any]:
    """Return what rebuilds a log history, and nothing else."""
    rebuild = np.empty(0).__reduce__()[0]
    names = ("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct")  # of numpy 1 and of numpy 2
    return [HistoryBuffer, np.ndarray, *((rebuild, name) for name in names), (_history_method, "builtins.getattr")]


def _history_method(owner: Any, name: str) -> Any:
    """Stand in for ``getattr``, with which a pickle could reach anything: a history asks it for its own statistics."""
    if owner is not HistoryBuffer or name.startswith("_"):
        raise pickle.UnpicklingError("Unsupported global: GLOBAL getattr of something else than a log history")
    return getattr(owner, name)
