"""Image classification: mixup, the loss of the logits, and tests that count the first and the first five classes."""

from __future__ import annotations

import logging
import time

import torch
from torch import Tensor, nn

from configs import Config
from data import Loaders, build_loaders, worker_failures
from loss import build_loss, build_mixup
from util.distributed import Process
from util.meters import Meters
from util.seed import seed_everything

from .base import BaseTrainer
from .evaluate import Score, evaluate
from .network import build_tested_network, tested_weights
from .precision import Precision, build_precision
from .report import log_environment, log_network, log_scores
from .signals import SignalWatch
from .stop import SignalError

__all__ = ["CLSTester", "CLSTrainer"]

logger = logging.getLogger(__name__)


class CLSTrainer(BaseTrainer):
    """Trains a classifier; modes train and ft."""

    def build_loss(self) -> list[str]:
        """Set up mixup and the loss, with its teachers, and return the names of the loss's terms."""
        self.mixup = build_mixup(self.config)
        self.loss = build_loss(self.config).to(self.process.device)
        return self.loss.names

    def build_loaders(self) -> Loaders:
        """Return the batches to train and to test on."""
        return _build_loaders(self.config, self.process)

    def compute_loss(self, images: Tensor, targets: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss and its terms of images (B, 3, H, W) and class indices (B,)."""
        if self.mixup is not None:
            images, targets = self.mixup(images, targets)
        outputs = self.trained(images)
        return self.loss(images, outputs, targets)

    def test_network(self, network: nn.Module, *, title: str) -> Score:
        """Return the score of a bare network; a collective."""
        return _test(
            self.config,
            self.process,
            network,
            loaders=self.loaders,
            precision=self.precision,
            watch=self.watch,
            title=title,
        )


class CLSTester:
    """Tests a classifier's checkpoint; modes test and test_net.

    Args:
        config: The resolved run.
        process: This process.

    Attributes:
        scores: By weights, once it has run.
        seconds: That each test took, reading the images included.

    Raises:
        ValueError: If there is nothing to test, or it does not fit.
    """

    def __init__(self, config: Config, process: Process) -> None:
        self.config = config
        self.process = process
        self.watch = SignalWatch()
        seed_everything(config.seed, deterministic=config.trainer.cuda_deterministic)
        self.precision = build_precision(config.trainer, process.device)
        log_environment(config, process, precision=str(self.precision))
        self.weights = tested_weights(config)
        self.loaders = _build_loaders(config, process)
        self.scores: dict[str, Score] = {}
        self.seconds: dict[str, float] = {}

    def run(self) -> int:
        """Test the plain and the averaged weights, as far as there are such; return the exit code."""
        start = time.perf_counter()
        with self.watch, worker_failures(self.config.trainer.data.num_workers_per_gpu):
            try:
                for name, ema in self.weights.items():
                    self.scores[name] = self._score(name, ema=ema)
            except SignalError as stop:
                logger.info("%s", stop)
                return stop.exit_code
        source = self.config.model.model_kwargs.checkpoint_path or "the released checkpoint"
        rows = {name: (None, score) for name, score in self.scores.items()}
        log_scores(rows, seconds=time.perf_counter() - start, place=f"weights from {source}")
        return 0

    def _score(self, name: str, *, ema: bool) -> Score:
        network = build_tested_network(self.config, self.process, ema=ema)
        log_network(f"{self.config.model.name} ({name})", network)
        start = time.perf_counter()
        score = _test(
            self.config,
            self.process,
            network,
            loaders=self.loaders,
            precision=self.precision,
            watch=self.watch,
            title=name,
        )
        self.seconds[name] = time.perf_counter() - start
        logger.info("Test %s: %s", name, score)
        return score


def _build_loaders(config: Config, process: Process) -> Loaders:
    loaders = build_loaders(config, rank=process.rank, world_size=process.world_size, device_type=process.device.type)
    data = config.trainer.data
    if loaders.train is not None:
        logger.info(
            "train: %d batches of %d images per process and epoch, %d in all per step; %d workers",
            len(loaders.train),
            data.batch_size_per_gpu,
            data.batch_size,
            data.num_workers_per_gpu,
        )
    return loaders


def _test(
    config: Config,
    process: Process,
    network: nn.Module,
    *,
    loaders: Loaders,
    precision: Precision,
    watch: SignalWatch,
    title: str,
) -> Score:
    return evaluate(
        network,
        loaders.test,
        title=title,
        process=process,
        precision=precision,
        meters=Meters(config.logging.log_terms_test),
        log_every=config.logging.test_log_per,
        watch=watch,
        memory_format=torch.channels_last if config.trainer.channels_last else torch.contiguous_format,
    )
