"""Reading OpenMMLab's checkpoints without running what they may hold.

mmengine runs what a file asks for beyond tensors; the original one, under PyTorch 2.6, refuses files of its own
trainings. Here a checkpoint may hold tensors, plain values, and the histories of a training's log.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmengine.logging import HistoryBuffer
from mmengine.runner import CheckpointLoader

from model.checkpoint import read_checkpoint, select_state_dict
from model.zoo import reading_histories

__all__ = ["load_local_checkpoint"]


@CheckpointLoader.register_scheme(prefixes="", force=True)
def load_local_checkpoint(filename: str | Path, map_location: Any = None) -> dict[str, Any]:
    """Read a file onto the CPU, from where models and optimizers take what they need.

    The weights then stand under ``state_dict``, wherever they stood before: mmengine finds them nowhere else, and would
    continue with random ones.

    Args:
        filename: The checkpoint.
        map_location: Unused; mmengine's signature.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is damaged, no checkpoint, holds code, or no weights.
    """
    with reading_histories(HistoryBuffer):
        checkpoint = read_checkpoint(Path(filename))
    weights, source = select_state_dict(checkpoint, ema=False, origin=filename)
    return {"state_dict": weights} if source == "bare" else {**checkpoint, "state_dict": weights}
