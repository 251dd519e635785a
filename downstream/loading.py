"""Reading OpenMMLab's checkpoints without running what they may hold.

mmengine runs what a file asks for beyond tensors; the original one, under PyTorch 2.6, refuses files of its own
trainings. Here a checkpoint may hold tensors, plain values, and a training's records of its losses.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.logging import HistoryBuffer
from mmengine.runner import CheckpointLoader

from model.checkpoint import read_checkpoint, select_state_dict

__all__ = ["load_local_checkpoint"]


@CheckpointLoader.register_scheme(prefixes="", force=True)
def load_local_checkpoint(filename: str | Path, map_location: Any = None) -> dict[str, Any]:
    """Read a file onto the CPU, from where models and optimizers take what they need.

    The weights stand under ``state_dict`` then, wherever they stood before: mmengine finds them nowhere else, and would
    go on with random ones.

    Args:
        filename: The checkpoint.
        map_location: Unused; mmengine's signature.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is damaged, no checkpoint, holds code, or no weights.
    """
    with torch.serialization.safe_globals(_records_of_a_training()):
        checkpoint = read_checkpoint(Path(filename))
    weights, source = select_state_dict(checkpoint, ema=False, origin=filename)
    return {"state_dict": weights} if source == "bare" else {**checkpoint, "state_dict": weights}


def _records_of_a_training() -> list[Any]:
    """Return what rebuilds the curves that mmengine saves beside the weights."""
    rebuild = np.zeros(0).__reduce__()[0]
    arrays = [(rebuild, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")]
    return [HistoryBuffer, np.ndarray, *arrays, (_statistic, "builtins.getattr"), (_statistic, "__builtin__.getattr")]


def _statistic(owner: Any, name: str) -> Any:
    """Stand in for `getattr`, with which a curve's statistics were saved, and for nothing else of it."""
    if owner is not HistoryBuffer or name.startswith("_"):
        raise ValueError(f"holds code: it asks for {name} of {owner}")
    return getattr(owner, name)
