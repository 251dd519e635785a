"""What of a run goes into a checkpoint, and back into a run that goes on from it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from configs import Config, to_dict
from data import Loaders
from optim import Schedule
from util.distributed import Process
from util.meters import Meters
from util.seed import get_rng_state, set_rng_state

from .batchnorm import batch_norm_statistics
from .checkpoint import CheckpointStore, RunLock, check_free_space, check_resumable, load_training_checkpoint
from .ema import WeightAverage
from .precision import Precision
from .run_state import RunState

__all__ = ["Parts", "Saver"]

logger = logging.getLogger(__name__)


@dataclass(kw_only=True, slots=True)
class Parts:
    """What of a run changes while it trains.

    Attributes:
        network: The bare network.
        average: The running average of its weights, if any.
        optimizer: Its optimiser.
        schedule: The learning rate over time.
        precision: Number format, with its scaler.
        meters: Named meters of this process.
    """

    network: nn.Module
    average: WeightAverage | None
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    precision: Precision
    meters: dict[str, Meters]


class Saver:
    """Writes a run's checkpoints on rank 0, and puts one back on every process.

    Args:
        config: The resolved run.
        process: This process.
        folder: The run's folder; locked for this run until `close`.
        parts: What is saved.
        loaders: Of the training set, for its fingerprint and its class names.

    Raises:
        ValueError: If another process uses the folder.
        OSError: If there is no room for the checkpoints.
    """

    def __init__(self, config: Config, process: Process, *, folder: Path, parts: Parts, loaders: Loaders) -> None:
        self.config = config
        self.process = process
        self.folder = folder
        self.parts = parts
        self.last_good: str | None = None
        self.meta = {
            "world_size": process.world_size,
            "batch_size": config.trainer.data.batch_size,
            "batch_size_per_gpu": config.trainer.data.batch_size_per_gpu,
            "accumulation_steps": config.trainer.accumulation_steps,
            "model": config.model.name,
            "fingerprint": loaders.train.fingerprint,
            "freeze": config.model.freeze,
        }
        self.class_names = loaders.class_names
        # Ranks differ in their statistics where neither every step nor the save makes them equal.
        self.has_own_statistics = process.is_distributed and config.trainer.dist_BN == "reduce"
        process.on_first(self._open)

    def _open(self) -> None:
        self._lock = RunLock(self.folder)
        self._store = CheckpointStore(self.folder)
        num_copies = 2 + (self.parts.average is not None) + 1  # weights, gradients' moments, average, the file aside
        weights = sum(value.numel() * value.element_size() for value in self.parts.network.state_dict().values())
        check_free_space(self.folder, 2 * num_copies * weights)

    def save_latest(self, state: RunState, *, periodic_epoch: int | None = None) -> str:
        """Save everything; a collective.

        Args:
            state: How far the run is.
            periodic_epoch: Keep a copy under this epoch's number as well.

        Returns:
            The path of the latest checkpoint.

        Raises:
            OSError: On every process, if rank 0 could not write. The checkpoint before is whole.
        """
        contents = self._contents(state)

        def write() -> str:
            if periodic_epoch is not None:
                self._store.save_periodic(contents, periodic_epoch)
            return str(self._store.save_latest(contents))

        self.last_good = self.process.on_first(write)
        return self.last_good

    def save_best(self, name: str, *, epoch: int, scores: Mapping[str, float]) -> None:
        """Keep the present weights as the best, ``name`` being ``net`` or ``net_E``; a collective."""
        parts = self.parts
        facts = {"epoch": epoch, "scores": scores, "class_names": self.class_names}

        def write() -> None:
            if name == "net":
                self._store.save_best_net(parts.network.state_dict(), **facts)
            elif parts.average is not None:
                self._store.save_best_ema(parts.average.state_dict(), **facts)

        self.process.on_first(write)

    def resume(self, *, steps_per_epoch: int) -> RunState:
        """Put the latest checkpoint of the folder back into the run; a collective.

        Returns:
            How far the run is.

        Raises:
            ValueError: If the checkpoint is not of such a run.
        """
        path = self.process.on_first(lambda: str(self._store.latest()))
        checkpoint = load_training_checkpoint(path)
        rescaled = check_resumable(checkpoint["meta"], self.meta, rescale=self.config.trainer.resume_rescale, path=path)
        if self.process.is_logging:
            _warn_of_changes(checkpoint.get("config", {}), to_dict(self.config))
        parts = self.parts
        parts.network.load_state_dict(checkpoint["net"])
        if parts.average is not None:
            parts.average.load_state_dict(checkpoint["net_E"] or checkpoint["net"])
        parts.optimizer.load_state_dict(checkpoint["optimizer"])
        parts.schedule.load_state_dict(checkpoint["scheduler"])
        parts.precision.load_state_dict(checkpoint["scaler"])
        state = RunState.from_state_dict(checkpoint["progress"])
        if rescaled:
            # Counted in images, so that what was seen is not seen again, nor anything left out.
            images = state.step * checkpoint["meta"]["batch_size"]
            state.step = min(images // self.meta["batch_size"], steps_per_epoch)
            state.iteration = state.epoch * steps_per_epoch + state.step
        self._load_own(checkpoint["rng"])
        self.last_good = path
        return state

    def close(self) -> None:
        """Give the folder free."""
        if self.process.rank == 0:
            self._lock.release()

    def _contents(self, state: RunState) -> dict[str, Any]:
        """Return the checkpoint on rank 0; on the others what they gave to it."""
        parts = self.parts
        own = {"state": get_rng_state(), "meters": {name: meters.state_dict() for name, meters in parts.meters.items()}}
        if self.has_own_statistics:
            own["statistics"] = [
                {name: value.cpu() for name, value in batch_norm_statistics(network).items()}
                for network in self._networks()
            ]
        ranks = self.process.gather_objects(own)
        return {
            "net": parts.network.state_dict(),
            "net_E": None if parts.average is None else parts.average.state_dict(),
            "optimizer": parts.optimizer.state_dict(),
            "scheduler": parts.schedule.state_dict(),
            "scaler": parts.precision.state_dict(),
            "iter": state.iteration,
            "epoch": state.epoch,
            "scores": state.scores,
            "time_spent": state.seconds,
            "rng": ranks,
            "meta": self.meta,
            "progress": state.state_dict(),
            "class_names": self.class_names,
            "config": to_dict(self.config),
        }

    def _load_own(self, ranks: list[dict[str, Any]]) -> None:
        """Take over what this rank gave; a rank that was not there keeps its fresh random states."""
        if self.process.rank >= len(ranks):
            return
        own = ranks[self.process.rank]
        set_rng_state(own["state"])
        for name, meters in self.parts.meters.items():
            meters.load_state_dict(own["meters"].get(name, {}))
        for network, saved in zip(self._networks(), own.get("statistics", ()), strict=False):
            current = batch_norm_statistics(network)
            for name, value in saved.items():
                current[name].copy_(value)

    def _networks(self) -> list[nn.Module]:
        average = self.parts.average
        return [self.parts.network] + ([] if average is None else [average.network])


def _warn_of_changes(saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Warn of entries that are not as they were, other than those that say how to resume."""
    before, now = _flatten(saved), _flatten(current)
    expected = ("trainer.resume_dir", "trainer.resume_rescale", "trainer.checkpoint", "derived")
    changed = [path for path in now if path in before and before[path] != now[path] and not path.startswith(expected)]
    if changed:
        text = ", ".join(f"{path} {before[path]} -> {now[path]}" for path in changed)
        logger.warning("the run goes on with other entries than before: %s", text)


def _flatten(tree: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(tree, (dict, list)):
        return {path: tree}
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    flat = {}
    for key, value in items:
        flat.update(_flatten(value, f"{path}.{key}" if path else str(key)))
    return flat
