"""A training run, set up in one straight line.

model -> freeze -> weight average -> data parallelism -> optimiser -> loss -> data -> schedule -> resume -> loop
"""

from __future__ import annotations

import abc
import json
import logging
from pathlib import Path

import torch
from torch import Tensor, nn

from configs import Config, save_config, to_dict
from configs.schema import LogTerm
from data import Loaders
from optim import build_optimizer, build_scheduler
from util.distributed import Process
from util.logging import FILE_ONLY
from util.memory import keep_freed_memory
from util.meters import Meters
from util.seed import seed_everything

from .checkpoint import make_run_folder
from .ema import WeightAverage
from .evaluate import Score
from .freeze import FrozenParts
from .network import build_network, wrap_parallel
from .precision import build_precision
from .report import Report, log_environment, log_network, open_log
from .run_state import RunState
from .saving import Parts, Saver
from .signals import SignalWatch
from .step import Stepper

__all__ = ["TrainerSetup"]

logger = logging.getLogger(__name__)


class TrainerSetup(abc.ABC):
    """What a training run needs, built in the order above; `trainer.base` has the loop.

    Args:
        config: The resolved run, in mode train or ft.
        process: This process.

    Raises:
        ValueError: If an entry, a checkpoint or the data are not fit for the run.
        OSError: If the run's folder cannot be written to.
    """

    def __init__(self, config: Config, process: Process) -> None:
        self.config = config
        self.process = process
        self.watch = SignalWatch()
        if process.device.type == "cpu":
            keep_freed_memory()
        # All processes build the same network; only then do their random numbers part.
        seed_everything(config.seed, deterministic=config.trainer.cuda_deterministic)
        self.folder = self._make_folder()
        self.precision = build_precision(config.trainer, process.device)
        log_environment(config, process, precision=str(self.precision))
        self._build_network()
        self.optimizer = build_optimizer(config, self.network)
        self.precision.prepare(self.network, self.optimizer)
        self.loss_names = self.build_loss()
        self.loaders = self.build_loaders()
        self._build_schedule()
        self._build_saver()
        self._start_or_resume()

    @abc.abstractmethod
    def build_loss(self) -> list[str]:
        """Set up what `compute_loss` needs, and return the names of its terms."""

    @abc.abstractmethod
    def build_loaders(self) -> Loaders:
        """Return the batches to train and to test on."""

    @abc.abstractmethod
    def compute_loss(self, images: Tensor, targets: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of a batch on the device, through ``self.trained``, and its terms."""

    @abc.abstractmethod
    def test_network(self, network: nn.Module, *, title: str) -> Score:
        """Return the score of a bare network; a collective."""

    def _make_folder(self) -> Path:
        trainer = self.config.trainer
        name = self.config.model.name

        def make() -> str:
            return str(make_run_folder(trainer.checkpoint, name, resume_dir=trainer.resume_dir))

        folder = Path(self.process.on_first(make))
        open_log(folder, self.process)
        return folder

    def _build_network(self) -> None:
        self.network = build_network(self.config, self.process)
        self.frozen = FrozenParts(self.network, self.config.model.freeze)
        log_network(self.config.model.name, self.network)
        decay = self.config.trainer.ema
        self.average = None if decay is None else WeightAverage(self.network, decay=decay)
        self.parallel = wrap_parallel(self.config, self.network, self.process)
        self.trained = self.parallel or self.network
        if self.config.trainer.compile:
            self.trained = torch.compile(self.trained)

    def _build_schedule(self) -> None:
        num_batches = len(self.loaders.train)
        self.num_micro = self.config.trainer.accumulation_steps
        self.steps_per_epoch = num_batches // self.num_micro
        if self.steps_per_epoch == 0:
            raise ValueError(
                f"the training set makes {num_batches} batches a process, less than one step of "
                f"trainer.accumulation_steps={self.num_micro}; use a smaller batch_size"
            )
        self.schedule = build_scheduler(self.config, self.optimizer, steps_per_epoch=self.steps_per_epoch)

    def _build_saver(self) -> None:
        self.meters = Meters(self.config.logging.log_terms_train)
        self.epoch_meters = Meters([LogTerm(name=name) for name in self.loss_names])
        self.saver = Saver(
            self.config,
            self.process,
            folder=self.folder,
            parts=Parts(
                network=self.network,
                average=self.average,
                optimizer=self.optimizer,
                schedule=self.schedule,
                precision=self.precision,
                meters={"train": self.meters, "epoch": self.epoch_meters},
            ),
            loaders=self.loaders,
        )

    def _start_or_resume(self) -> None:
        """Put a run that goes on back where it was; random states last, so that nothing draws from them before."""
        seed_everything(self.config.seed, rank=self.process.rank, deterministic=self.config.trainer.cuda_deterministic)
        self.state = RunState()
        if self.config.trainer.resume_dir:
            self.state = self.saver.resume(steps_per_epoch=self.steps_per_epoch)
            logger.info(
                "goes on from %s, after %d of %d epochs and %d steps, iteration %d",
                self.saver.last_good,
                self.state.epoch,
                self.schedule.num_epochs,
                self.state.step,
                self.state.iteration,
            )
        logger.info("config %s", json.dumps(to_dict(self.config), indent=1), extra=FILE_ONLY)
        self.process.on_first(lambda: save_config(self.config, self.folder / "config.yaml"))
        logger.info("files go to %s", self.folder)
        self.report = Report(self.folder, self.process, self.state)
        self.stepper = Stepper(
            self.config,
            self.process,
            network=self.network,
            parallel=self.parallel,
            optimizer=self.optimizer,
            average=self.average,
            precision=self.precision,
            compute_loss=self.compute_loss,
            watch=self.watch,
        )
