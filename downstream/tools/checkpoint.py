"""Checkpoints as mmengine writes them, read without running anything and compared with the model before they count."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import torch
from mmengine.hooks import Hook
from mmengine.logging import HistoryBuffer
from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.runner import CheckpointLoader, Runner
from torch import nn

from model.checkpoint import read_checkpoint, select_state_dict
from model.mismatch import compare, explain

from .errors import InputError

__all__ = ["CheckpointCheck", "check_weights", "read_weights", "use_safe_loading"]

HEADS = ("bbox_head.", "roi_head.", "decode_head.", "auxiliary_head.")
CLASSIFIER = "patch_embed."  # where the weights of a backbone of its own begin

logger = logging.getLogger(__name__)


def use_safe_loading() -> None:
    """Let mmengine read checkpoints by `read_weights`; its own reader runs what a file holds when the safe one fails."""
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
    rebuild = np.empty(0).__reduce__()[0]
    names = ("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct")  # of numpy 1 and of numpy 2
    return [HistoryBuffer, np.ndarray, *((rebuild, name) for name in names)]


class CheckpointCheck(Hook):
    """Refuses weights that are not the model's, where mmengine alone would load what fits and go on.

    Args:
        path: The checkpoint, for messages.
        allows_new_heads: Let heads of another class count start anew, as in fine-tuning.
    """

    def __init__(self, path: str, *, allows_new_heads: bool = False) -> None:
        self.path = path
        self.allows_new_heads = allows_new_heads

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Compare before mmengine loads."""
        check_weights(runner.model, checkpoint, self.path, allows_new_heads=self.allows_new_heads)


def check_weights(
    network: nn.Module, checkpoint: dict[str, Any], path: str, *, allows_new_heads: bool = False
) -> None:
    """Compare a checkpoint's weights with a network's entries.

    Args:
        network: The model, or a wrapper of it.
        checkpoint: As `read_weights` returned it. Entries of heads that start anew are taken out.
        path: The file, for messages.
        allows_new_heads: Let head entries of another shape start anew.

    Raises:
        InputError: They are another model's, in one grouped report.
    """
    while is_model_wrapper(network) or isinstance(network, BaseTTAModel):
        network = network.module
    own, weights = network.state_dict(), checkpoint["state_dict"]
    # Files of before PyTorch 0.4.1 have no batch counters.
    own = {entry: value for entry, value in own.items() if entry in weights or "num_batches_tracked" not in entry}
    report = compare(weights, own, source="state_dict")
    if allows_new_heads:
        anew = [entry for entry in report.mismatched if entry.startswith(HEADS)]
        for entry in anew:
            del weights[entry], own[entry]
        if anew:
            logger.warning("%s: %d entries have another shape and start anew: %s", path, len(anew), ", ".join(anew))
            report = compare(weights, own, source="state_dict")
    if not report.fits:
        reasons = [*explain(report, weights, own, heads=()), _hint(set(weights), set(own))]
        raise InputError("\n  ".join([f"{path} does not fit the model of the configuration.", *reasons]))


def _hint(weights: set[str], own: set[str]) -> str:
    theirs, ours = ({entry.partition(".")[0] for entry in entries} for entries in (weights, own))
    if any(entry.startswith(CLASSIFIER) for entry in weights):
        return "These are a classifier's weights: train from them with --cfg-options model.backbone.pretrained=FILE."
    if theirs != ours:
        listed = [", ".join(sorted(modules)) for modules in (theirs, ours)]
        return f"The file is of a model of {listed[0]}, the configuration's of {listed[1]}: give those that belong together."
    return "Give the configuration that it was trained with; for other classes, the num_classes of its heads."
