"""The test of a classifier's checkpoint: its plain and its averaged weights."""

from __future__ import annotations

import logging
import time

from configs import Config
from data import build_loaders, worker_failures
from util.distributed import Process
from util.seed import seed_everything

from .evaluate import Score, build_evaluator
from .network import build_tested_network, read_weights, tested_weights
from .precision import build_precision
from .report import log_environment, log_network, log_scores
from .setup import fill_classes
from .stop import SignalError, SignalWatch

__all__ = ["Tester"]

logger = logging.getLogger(__name__)


class Tester:
    """Tests a classifier's checkpoint; modes test and test_net.

    Args:
        config: The resolved run.
        process: This process.

    Attributes:
        scores: By weights, once it has run.
        seconds: Duration of each test, reading the images included.

    Raises:
        ValueError: If there is nothing to test, or it does not fit.
    """

    def __init__(self, config: Config, process: Process) -> None:
        config, dataset = fill_classes(config, process)
        self.config = config
        self.process = process
        self.watch = SignalWatch()
        seed_everything(config.seed, deterministic=config.trainer.cuda_deterministic)
        precision = build_precision(config.trainer, process.device)
        log_environment(config, process, precision)
        self.checkpoint = read_weights(config)
        self.loaders = build_loaders(
            config,
            rank=process.rank,
            world_size=process.world_size,
            device_type=process.device.type,
            first=dataset,
        )
        self.evaluator = build_evaluator(
            config, process, loader=self.loaders.test, precision=precision, watch=self.watch
        )
        self.scores: dict[str, Score] = {}
        self.seconds: dict[str, float] = {}

    def run(self) -> int:
        """Test the plain and the averaged weights, where there are such; return the exit code."""
        start = time.perf_counter()
        num_workers = self.loaders.test.num_workers
        with self.watch, worker_failures(num_workers, rank=self.process.rank):
            try:
                for name, ema in tested_weights(self.config, self.checkpoint).items():
                    self._test(name, ema=ema)
            except SignalError as stop:
                logger.info("%s", stop)
                return stop.exit_code
        source = self.config.model.model_kwargs.checkpoint_path or "the released checkpoint"
        rows = {name: (None, score) for name, score in self.scores.items()}
        log_scores(rows, seconds=time.perf_counter() - start, place=f"weights from {source}")
        return 0

    def _test(self, name: str, *, ema: bool) -> None:
        network = build_tested_network(self.config, self.process, self.checkpoint, ema=ema)
        log_network(f"{self.config.model.name} ({name})", network)
        start = time.perf_counter()
        self.scores[name] = self.evaluator(network, title=name)
        self.seconds[name] = time.perf_counter() - start
        logger.info("Test %s: %s", name, self.scores[name])
