"""A training run's checkpoint files: saved so that a kill at any moment loses nothing, and read back to resume.

Every file is written aside, flushed to the disk and renamed, and holds tensors and plain containers only.
"""

from __future__ import annotations

import errno
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model.checkpoint import read_checkpoint
from model.files import SUFFIX, remove_leftovers, replacing

__all__ = [
    "TRAINING_ENTRIES",
    "CheckpointStore",
    "check_resumable",
    "load_training_checkpoint",
    "save_atomically",
    "snapshot",
]

logger = logging.getLogger(__name__)

LATEST = "latest_ckpt.pth"
BEST_NET = "net.pth"
BEST_EMA = "net_E.pth"

# `net_E` and `scaler` may be None; `scores` is the score history, `time_spent` in seconds, `rng` the random states,
# `meta` the facts that `check_resumable` compares.
TRAINING_ENTRIES = (
    "net",
    "net_E",
    "optimizer",
    "scheduler",
    "scaler",
    "iter",
    "epoch",
    "scores",
    "time_spent",
    "rng",
    "meta",
)
LEFTOVERS = (SUFFIX, ".tmp")  # suffixes of files that were being written: today's, and that of older runs
RESCALABLE = ("world_size", "batch_size", "batch_size_per_gpu", "accumulation_steps")
FIXED = ("model", "fingerprint")


def save_atomically(obj: Any, path: str | Path) -> None:
    """Save with ``torch.save`` so that the path holds either the old file, whole, or the new one, whole.

    Leftovers of earlier saves to the path that were killed are removed first, so only one process may save to a path.

    Args:
        obj: Tensors and plain containers; numpy numbers and arrays are converted.
        path: The file; its folder must exist.

    Raises:
        OSError: The file cannot be written, the disk being full for one; the old file is as it was.
        TypeError: Something in ``obj`` would not load again with ``weights_only``.
    """
    path = Path(path)
    plain = _to_plain(obj, "")
    _remove_leftovers(path.parent, path.name)
    try:
        with replacing(path) as aside, aside.open("xb") as file:
            torch.save(plain, file)
    except Exception as error:
        cause = _os_error_behind(error)
        if cause is None:
            raise
        state = "the one saved before is intact" if path.exists() else "nothing was saved there before"
        message = (
            f"cannot be saved ({cause.strerror or cause}); {state}; free some space or repair the folder, then resume"
        )
        raise OSError(cause.errno or errno.EIO, message, str(path)) from error


def snapshot(obj: Any) -> Any:
    """Return a copy of everything, with tensors on the CPU, that later training steps do not change.

    Raises:
        TypeError: Something in ``obj`` could not be saved by `save_atomically`.
    """
    return _to_plain(obj, "", is_copy=True)


def _to_plain(value: Any, where: str, *, is_copy: bool = False) -> Any:
    """Return the value in types that load with ``weights_only``; tensors keep sharing their memory unless copied."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True) if is_copy else value.detach()
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value.copy())
    if isinstance(value, Mapping):
        return {
            _to_plain(key, where): _to_plain(item, f"{where}[{key!r}]", is_copy=is_copy) for key, item in value.items()
        }
    if type(value) in (list, tuple):
        return type(value)(_to_plain(item, f"{where}[{index}]", is_copy=is_copy) for index, item in enumerate(value))
    if value is None or type(value) in (bool, int, float, complex, str, bytes):
        return value
    raise TypeError(f"checkpoint{where} is a {type(value).__name__}, which would not load again with weights_only")


def _remove_leftovers(folder: Path, name: str | None = None) -> None:
    for leftover in remove_leftovers(folder, name, suffixes=LEFTOVERS):
        logger.info("removed %s, left over from a save that was killed", leftover)


def _os_error_behind(error: BaseException | None) -> OSError | None:
    # A failed write surfaces from torch.save as a RuntimeError about the archive, with the OSError as its context.
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


class CheckpointStore:
    """The checkpoint files of one run; on the one process that writes, which holds the folder's `RunLock`.

    Args:
        folder: The run's folder. Leftovers of saves that were killed are removed from it.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        _remove_leftovers(self.folder)

    def save_latest(self, state: Mapping[str, Any]) -> Path:
        """Save all that a resume needs, as ``latest_ckpt.pth``.

        Raises:
            ValueError: The state lacks an entry of `TRAINING_ENTRIES`.
            OSError: See `save_atomically`.
        """
        return self._save_state(state, LATEST)

    def save_periodic(self, state: Mapping[str, Any], epoch: int) -> Path:
        """Save the same as ``ckpt_<epoch>.pth``, which is kept until `prune` deletes it."""
        return self._save_state(state, f"ckpt_{epoch}.pth")

    def prune(self, keep: int | None, *, epoch: int) -> None:
        """Delete all but the newest ``keep`` periodic checkpoints; None keeps all.

        Those after ``epoch``, of a run that went back to an earlier one, neither count nor are deleted.
        """
        if keep is None:
            return
        numbers = (re.fullmatch(r"ckpt_(\d+)\.pth", file.name) for file in self.folder.glob("ckpt_*.pth"))
        past = sorted(number for found in numbers if found and (number := int(found[1])) <= epoch)
        for number in past[:-keep]:
            (self.folder / f"ckpt_{number}.pth").unlink(missing_ok=True)

    def save_best_net(self, weights: Mapping[str, Tensor], **facts: Any) -> Path:
        """Save the best plain weights so far, with facts on them (epoch, scores), as ``net.pth``."""
        return self._save({"net": weights, **facts}, BEST_NET)

    def save_best_ema(self, weights: Mapping[str, Tensor], **facts: Any) -> Path:
        """Save the best averaged weights so far, with facts on them (epoch, scores), as ``net_E.pth``."""
        return self._save({"net_E": weights, **facts}, BEST_EMA)

    def latest(self) -> Path:
        """Return the path of the checkpoint to resume from.

        Raises:
            FileNotFoundError: There is none; the checkpoints that there are get named.
        """
        path = self.folder / LATEST
        if path.is_file():
            return path
        weights = self.folder / BEST_NET
        if periodic := sorted(file.name for file in self.folder.glob("ckpt_*.pth")):
            hint = f"; copy one of {', '.join(periodic)} to that name to resume from it"
        elif weights.is_file():
            hint = f": start a new run, from its weights with model.model_kwargs.checkpoint_path={weights}"
        else:
            hint = ": start a new run"
        raise FileNotFoundError(f"{self.folder} holds no {LATEST} to resume from{hint}")

    def _save_state(self, state: Mapping[str, Any], name: str) -> Path:
        lacking = [entry for entry in TRAINING_ENTRIES if entry not in state]
        if lacking:
            raise ValueError(f"the state to be saved as {name} lacks {', '.join(lacking)}")
        return self._save(state, name)

    def _save(self, contents: Mapping[str, Any], name: str) -> Path:
        path = self.folder / name
        save_atomically(contents, path)
        return path


def load_training_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint to resume from.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It cannot be read, or holds only weights; the missing entries are named.
    """
    checkpoint = read_checkpoint(path)
    lacking = [entry for entry in TRAINING_ENTRIES if entry not in checkpoint]
    if lacking:
        raise ValueError(
            f"{path} cannot be resumed from, it lacks {', '.join(lacking)}: name the folder of a run that saved "
            f"{LATEST}, or start from its weights with model.model_kwargs.checkpoint_path={path}"
        )
    return checkpoint


def check_resumable(
    saved: Mapping[str, Any], current: Mapping[str, Any], *, rescale: bool, path: str | Path, other_data: bool = False
) -> tuple[str, ...]:
    """Check that a run may resume from a checkpoint.

    Args:
        saved: The checkpoint's ``meta``: ``world_size``, ``batch_size`` (images per optimiser step),
            ``batch_size_per_gpu``, ``accumulation_steps``, ``model`` (the name), ``fingerprint`` (of the dataset),
            ``freeze`` (empty, where it is left out); in newer checkpoints ``num_train``, ``num_test``,
            ``test_fingerprint`` and ``contents`` (a hash of some images) as well.
        current: The same of this run.
        rescale: Whether another number of images per step was asked for. Other shares of the same images, as a job that
            lost a node has, need no asking: the images of each step stay the same.
        path: The checkpoint, for messages.
        other_data: Whether another validation set and other contents of the images were accepted.

    Returns:
        The names of the numbers that differ.

    Raises:
        ValueError: The network or the dataset differs, or the images per step do without ``rescale``; both values are
            named.
    """
    saved = saved if isinstance(saved, Mapping) else {}
    lacking = [name for name in FIXED + RESCALABLE if name not in saved]
    if lacking:
        raise ValueError(f"{path} cannot be resumed from: its meta lacks {', '.join(lacking)}; start a new run")
    if saved["fingerprint"] != current["fingerprint"]:
        raise ValueError(
            f"{path} was trained on another dataset (fingerprint {saved['fingerprint']}, this one has "
            f"{current['fingerprint']}): put the dataset back as it was, or start a new run from its weights"
        )
    _check_same_data(saved, current, accept=other_data, path=path)
    if saved["model"] != current["model"]:
        raise ValueError(f"{path} is of {saved['model']}, not of {current['model']}: set model.name={saved['model']}")
    if saved.get("freeze", "") != current.get("freeze", ""):
        raise ValueError(
            f"{path} was trained with model.freeze={saved.get('freeze', '')!r}, this run has "
            f"{current.get('freeze', '')!r}: set it as it was, or start a new run from its weights"
        )
    changed = tuple(name for name in RESCALABLE if saved[name] != current[name])
    if not changed:
        return ()
    then = ", ".join(f"{name}={saved[name]}" for name in changed)
    now = ", ".join(f"{name}={current[name]}" for name in changed)
    if "batch_size" in changed and not rescale:
        raise ValueError(
            f"{path} was saved with {then}, this run has {now}: start it as it was, or accept the change with "
            "trainer.resume_rescale=True"
        )
    logger.warning("%s was saved with %s; the run resumes with %s", path, then, now)
    return changed


def _check_same_data(saved: Mapping[str, Any], current: Mapping[str, Any], *, accept: bool, path: str | Path) -> None:
    """Compare the validation set and the contents of the images, which checkpoints of before lack."""
    then, now = (
        f"{facts.get('num_train')} training and {facts.get('num_test')} validation images" for facts in (saved, current)
    )
    causes = {
        "test_fingerprint": f"was trained with another validation set ({then}, this run has {now})",
        "contents": f"was trained on images with other contents under the same names ({now})",
    }
    changes = [cause for name, cause in causes.items() if saved.get(name, current.get(name)) != current.get(name)]
    if not changes:
        return
    if not accept:
        raise ValueError(
            f"{path} {changes[0]}: put the data back as they were, or accept the change with trainer.resume_data=True"
        )
    logger.warning("%s %s", path, changes[0])
