"""The contents of a training checkpoint: taken from a run, and put back into one that resumes."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from configs import Config, save_config, to_dict
from data import Loaders
from model.preparation import ENTRY as TEST_TRANSFORM
from model.preparation import describe_steps
from optim import Schedule
from util.distributed import Process
from util.logging import add_log_file
from util.meters import Meters
from util.seed import get_rng_state, set_rng_state

from .average import WeightAverage
from .batchnorm import batch_norm_statistics
from .checkpoint import LATEST, CheckpointStore, check_resumable, load_training_checkpoint
from .evaluate import Score
from .fit import check_contents, load_optimizer
from .precision import Precision
from .resume import changed_entries
from .run_folder import RunLock, check_free_space
from .writer import Writer

__all__ = ["RunState", "Saver"]

logger = logging.getLogger(__name__)


@dataclass(kw_only=True, slots=True)
class RunState:
    """Counters of a run; part of every checkpoint.

    Attributes:
        epoch: Epochs done.
        step: Optimiser steps done in the current, unfinished epoch.
        iteration: Optimiser steps done altogether, skipped ones included.
        seconds: Time spent.
        bad_steps: Steps skipped in a row, for reasons other than the loss scale.
        skipped_steps: Steps skipped altogether.
        unreadable: Training images that could not be read.
        scores: One record per test: ``epoch``, counted from 1, and per weights (net, net_E) the counts.
    """

    epoch: int = 0
    step: int = 0
    iteration: int = 0
    seconds: float = 0.0
    bad_steps: int = 0
    skipped_steps: int = 0
    unreadable: list[str] = field(default_factory=list)
    scores: list[dict[str, Any]] = field(default_factory=list)

    def add_scores(self, epoch: int, scores: Mapping[str, Score]) -> list[str]:
        """Record a test.

        Args:
            epoch: Counted from 1.
            scores: By weights.

        Returns:
            The weights whose top-1 is the best so far.
        """
        previous = {name: self.best(name) for name in scores}
        self.scores.append({"epoch": epoch, **{name: asdict(score) for name, score in scores.items()}})
        return [name for name, score in scores.items() if previous[name] is None or score.top1 > previous[name][1].top1]

    def best(self, name: str) -> tuple[int, Score] | None:
        """Return the epoch, counted from 1, and the score of the best test of these weights; the first of equals."""
        records = [(record["epoch"], Score(**record[name])) for record in self.scores if name in record]
        return max(records, key=lambda record: record[1].top1, default=None)

    def state_dict(self) -> dict[str, Any]:
        """Return everything as plain values."""
        return asdict(self)

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> RunState:
        """Undo `state_dict`."""
        return cls(**{item.name: state[item.name] for item in fields(cls)})


class Saver:
    """Writes a run's checkpoints on rank 0, and puts one back on every process.

    With ``trainer.async_save`` a thread writes them. Then an error of a write is raised by the next save or `wait`.

    Args:
        config: The resolved run; part of every checkpoint.
        process: This process.
        folder: The run's folder; locked for this run until `close`.
        network: The bare network.
        average: The running average of its weights, if any.
        optimizer: Its optimiser.
        schedule: The learning rate over time.
        precision: Number format, with its scaler.
        meters: Named meters of this process.
        loaders: Give the fingerprints of the data and the class names.

    Attributes:
        last_good: Path of the latest checkpoint that is whole; None before the first.

    Raises:
        ValueError: If another process uses the folder.
        OSError: If there is no room for the checkpoints.
    """

    def __init__(
        self,
        config: Config,
        process: Process,
        *,
        folder: Path,
        network: nn.Module,
        average: WeightAverage | None,
        optimizer: torch.optim.Optimizer,
        schedule: Schedule,
        precision: Precision,
        meters: Mapping[str, Meters],
        loaders: Loaders,
    ) -> None:
        self.config = config
        self.process = process
        self.folder = folder
        self.network = network
        self.average = average
        self.optimizer = optimizer
        self.schedule = schedule
        self.precision = precision
        self.meters = meters
        self.meta = _facts(config, process, loaders)
        # Ranks keep batch-norm statistics of their own where these are made equal neither in each step nor for a save.
        self.has_own_statistics = process.is_distributed and config.trainer.dist_BN == "reduce"
        self.last_good: str | None = None
        # For those who have only the file: what its classes are called, and how to prepare images.
        self._description = {
            "class_names": loaders.class_names,
            TEST_TRANSFORM: describe_steps(to_dict(config)["data"]["test_transforms"]),
        }
        self._latest = str(folder / LATEST)
        self._is_pending = False
        self._writer = Writer(is_asynchronous=config.trainer.async_save)
        self._lock: RunLock | None = None
        self._store: CheckpointStore | None = None
        process.on_first(self._open)

    def _open(self) -> None:
        self._lock = RunLock(self.folder)
        self._store = CheckpointStore(self.folder)
        num_copies = 2 + (self.average is not None) + 1  # weights, gradients' moments, average, the file aside
        weights = sum(value.numel() * value.element_size() for value in self.network.state_dict().values())
        check_free_space(self.folder, 2 * num_copies * weights)

    def save_latest(self, state: RunState, *, periodic_epoch: int | None = None) -> None:
        """Save everything; a collective.

        Args:
            state: The run's counters.
            periodic_epoch: Keep a copy under this epoch's number as well.

        Raises:
            OSError: On every process, if rank 0 could not write. The checkpoint before is whole.
        """
        self.wait()

        def save(contents: Mapping[str, Any]) -> None:
            if periodic_epoch is not None:
                self._store.save_periodic(contents, periodic_epoch)
            self._store.save_latest(contents)
            if periodic_epoch is not None:
                self._store.prune(self.config.trainer.keep_checkpoints, epoch=periodic_epoch)

        self._write(save, self._contents(state))
        if self.config.trainer.async_save:
            self._is_pending = True
        else:
            self.last_good = self._latest

    def save_best(self, name: str, *, epoch: int, scores: Mapping[str, float]) -> None:
        """Keep the present weights as the best, ``name`` being ``net`` or ``net_E``; a collective."""
        facts = {"epoch": epoch, "scores": scores, **self._description}

        def save(weights: Mapping[str, Any]) -> None:
            save_weights = self._store.save_best_net if name == "net" else self._store.save_best_ema
            save_weights(weights, **facts)

        network = self.network if name == "net" else self.average.module
        self._write(save, network.state_dict())

    def wait(self) -> None:
        """Wait until everything is saved; a collective.

        Raises:
            OSError: On every process, if rank 0 could not write.
        """
        if self._is_pending:
            self._is_pending = False
            self.process.on_first(self._writer.wait)
            self.last_good = self._latest

    def is_in_place(self) -> bool:
        """Return whether the latest checkpoint is where it was saved; a collective."""
        last_good = self.last_good
        return last_good is not None and self.process.on_first(Path(last_good).is_file)

    def _write(self, save: Callable[[Any], None], contents: Any) -> None:
        """Have contents saved by rank 0, in a folder that is there; a collective."""

        def write() -> None:
            if not self._lock.is_in_place():
                self._make_folder_again()
            self._writer(save, contents)

        self.process.on_first(write)

    def _make_folder_again(self) -> None:
        logger.warning("%s was deleted or moved during the run: it is made again, without its older files", self.folder)
        self.last_good = None
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock.release()
        self._lock = RunLock(self.folder)
        save_config(self.config, self.folder / "config.yaml")
        if self.process.is_logging:
            add_log_file(self.folder / "log.txt")

    def resume(self, *, steps_per_epoch: int) -> RunState:
        """Put the latest checkpoint of the folder back into the run; a collective.

        Returns:
            The run's counters.

        Raises:
            ValueError: If the checkpoint is not of such a run.
        """
        path = self.process.on_first(lambda: str(self._store.latest()))
        checkpoint = load_training_checkpoint(path)
        options = self.config.trainer
        rescaled = check_resumable(
            checkpoint["meta"], self.meta, rescale=options.resume_rescale, other_data=options.resume_data, path=path
        )
        networks = {"net": self.network}
        if self.average is not None:
            networks["net_E" if checkpoint["net_E"] else "net"] = self.average.module
        check_contents(
            checkpoint,
            self.config,
            networks=networks,
            optimizer=self.optimizer,
            progress=RunState().state_dict(),
            path=path,
        )
        if self.process.is_logging:
            _warn_of_changes(checkpoint.get("config", {}), to_dict(self.config))
        self.network.load_state_dict(checkpoint["net"])
        if self.average is not None:
            self.average.module.load_state_dict(checkpoint["net_E"] or checkpoint["net"])
        if options.resume_optimizer:
            load_optimizer(self.optimizer, checkpoint["optimizer"], self.config)
        else:
            logger.info("the optimiser starts afresh (trainer.resume_optimizer=false)")
        self.schedule.load_state_dict(checkpoint["scheduler"])
        self.precision.load_state_dict(checkpoint["scaler"])
        state = RunState.from_state_dict(checkpoint["progress"])
        if rescaled:
            # Counted in images, so that none is seen twice in the epoch and none is left out.
            images = state.step * checkpoint["meta"]["batch_size"]
            state.step = min(images // self.meta["batch_size"], steps_per_epoch)
            state.iteration = state.epoch * steps_per_epoch + state.step
        self._load_own(checkpoint["rng"])
        self.last_good = path
        return state

    def settle(self) -> str | None:
        """Wait for this process's own writes; return the path of the latest checkpoint that it knows to be whole."""
        if self._is_pending and self.process.rank == 0:
            self._is_pending = False
            with contextlib.suppress(OSError):  # whoever asks has an error of its own to tell
                self._writer.wait()
                self.last_good = self._latest
        return self.last_good

    def close(self) -> None:
        """Wait for what is being written, and release the folder.

        Raises:
            OSError: Something could not be written.
        """
        try:
            self._writer.close()
        finally:
            if self._lock is not None:
                self._lock.release()

    def _contents(self, state: RunState) -> dict[str, Any]:
        """Return the checkpoint; every process contributes its own part, under ``rng``."""
        own = {"state": get_rng_state(), "meters": {name: meters.state_dict() for name, meters in self.meters.items()}}
        if self.has_own_statistics:
            own["statistics"] = [
                {name: value.cpu() for name, value in batch_norm_statistics(network).items()}
                for network in self._networks()
            ]
        ranks = self.process.gather_objects(own)
        return {
            "net": self.network.state_dict(),
            "net_E": None if self.average is None else self.average.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.schedule.state_dict(),
            "scaler": self.precision.state_dict(),
            "iter": state.iteration,
            "epoch": state.epoch,
            "scores": state.scores,
            "time_spent": state.seconds,
            "rng": ranks,
            "meta": self.meta,
            "progress": state.state_dict(),
            **self._description,
            "config": to_dict(self.config),
        }

    def _load_own(self, ranks: list[dict[str, Any]]) -> None:
        """Restore this rank's own part; a rank that was not there keeps its fresh random states."""
        if self.process.rank >= len(ranks):
            return
        own = ranks[self.process.rank]
        set_rng_state(own["state"])
        for name, meters in self.meters.items():
            meters.load_state_dict(own["meters"].get(name, {}))
        for network, saved in zip(self._networks(), own.get("statistics", ()), strict=False):
            current = batch_norm_statistics(network)
            for name, value in saved.items():
                current[name].copy_(value)

    def _networks(self) -> list[nn.Module]:
        return [self.network] + ([] if self.average is None else [self.average.module])


def _facts(config: Config, process: Process, loaders: Loaders) -> dict[str, Any]:
    """Return the facts that must agree at a resume; see `check_resumable`."""
    test = loaders.test.dataset
    return {
        "world_size": process.world_size,
        "batch_size": config.trainer.data.batch_size,
        "batch_size_per_gpu": config.trainer.data.batch_size_per_gpu,
        "accumulation_steps": config.trainer.accumulation_steps,
        "model": config.model.name,
        "fingerprint": loaders.train.fingerprint,
        "freeze": config.model.freeze,
        "num_train": len(loaders.train.dataset),
        "num_test": len(test),
        "test_fingerprint": test.fingerprint(),
        "contents": process.on_first(loaders.contents),
    }


def _warn_of_changes(saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Warn of entries that have changed, other than those that say how to resume."""
    text = ", ".join(f"{path} {before} -> {now}" for path, before, now in changed_entries(saved, current))
    if text:
        logger.warning("the run resumes with other entries than before: %s", text)
