"""The log of a run: the lines at its start, progress, every epoch's numbers, the table at its end."""

from __future__ import annotations

import logging
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from configs import Config
from data import ImageDataset
from util.cores import count_cores, describe_threads
from util.distributed import Process
from util.logging import (
    PROGRESS,
    EpochLog,
    LogGuard,
    add_log_file,
    duration,
    failed_outputs,
    open_scalar_log,
    table,
)
from util.meters import Meters
from util.trackers import Background, ScalarLogs, ScalarWriter

from ..evaluate import Answers, Score
from ..precision import Precision
from ..snapshot import RunState
from .mistakes import find_mistakes, mistakes_path, write_mistakes
from .page import page_path, write_page

__all__ = ["Report", "log_environment", "log_network", "log_scores", "open_log"]

logger = logging.getLogger(__name__)


def log_environment(config: Config, process: Process, precision: Precision) -> None:
    """Log the hardware, the versions and the mode."""
    device = torch.cuda.get_device_name(process.device) if process.device.type == "cuda" else platform.machine()
    logger.info(
        "device %s (%s), %s, %d process(es), backend %s; torch %s, python %s",
        process.device.type,
        device,
        describe_threads(count_cores()),
        process.world_size,
        process.backend,
        torch.__version__,
        platform.python_version(),
    )
    logger.info("mode %s, precision %s, seed %d", config.mode, precision, config.seed)


def log_network(name: str, network: nn.Module) -> None:
    """Log the name and the parameter counts, all and trainable."""
    counts = [(parameter.numel(), parameter.requires_grad) for parameter in network.parameters()]
    total = sum(count for count, _ in counts)
    trainable = sum(count for count, is_trained in counts if is_trained)
    logger.info("network %s, %s parameters, %s trainable", name, f"{total:,}", f"{trainable:,}")


def log_scores(rows: Mapping[str, tuple[int | None, Score]], *, seconds: float, place: str) -> None:
    """Log the table of results.

    Args:
        rows: Epoch, if any, and score by weights.
        seconds: Time spent.
        place: Where the weights are from, or where the run's files are.
    """
    lines = [
        [
            name,
            f"{score.top1:.3f}",
            f"{score.top5:.3f}",
            f"{score.top1_count}/{score.num_images}",
            "-" if epoch is None else str(epoch),
        ]
        for name, (epoch, score) in rows.items()
    ]
    text = table(["weights", "top-1", "top-5", "right/images", "epoch"], lines)
    logger.info("results\n%s\ntotal time %s; %s", text, duration(seconds), place)


class Report:
    """The log of a training run; on the processes that do not log, it writes nothing.

    A file of it that cannot be written is reported, dropped, and named again by `close`; the run continues.

    Args:
        folder: The run's folder.
        process: This process.
        state: The run's counters at its start.
        num_epochs: Length of the run.
        steps_per_epoch: Optimiser steps in an epoch.
        class_names: Name of each class.
        trackers: Open further logs of the numbers that TensorBoard gets, by name.
    """

    def __init__(
        self,
        folder: Path,
        process: Process,
        state: RunState,
        *,
        num_epochs: int,
        steps_per_epoch: int,
        class_names: Sequence[str],
        trackers: Mapping[str, Callable[[], ScalarWriter]],
    ) -> None:
        self.folder = folder
        self.process = process
        self.num_epochs = num_epochs
        self.num_iterations = num_epochs * steps_per_epoch
        self.class_names = class_names
        self._start = time.perf_counter()
        self._start_iteration = state.iteration
        self._epoch_path = folder / "epochs.jsonl"
        self._scalar_path = folder / "tensorboard"
        self._guard = LogGuard()
        self._epochs: EpochLog | None = None
        self._scalars: ScalarLogs | None = None
        if process.is_logging:
            self._epochs = self._guard(self._epoch_path, EpochLog, self._epoch_path, num_epochs=state.epoch)
            curves = partial(open_scalar_log, self._scalar_path, step=state.iteration)
            background = {name: partial(Background, opener) for name, opener in trackers.items()}
            self._scalars = ScalarLogs(self._guard, {self._scalar_path: curves, **background})

    def train_line(self, meters: Meters, state: RunState) -> str:
        """Log one line of progress; a collective.

        Returns:
            Its columns.
        """
        readings = meters.read(self.process)
        columns = meters.columns(readings)
        done = state.iteration - self._start_iteration
        pace = (time.perf_counter() - self._start) / max(done, 1)
        logger.info(
            "Train: %.1f%% [%d/%d] [%d/%d] %s [eta %s]",
            100 * state.iteration / self.num_iterations,
            state.epoch + 1,
            self.num_epochs,
            state.iteration,
            self.num_iterations,
            columns,
            duration(pace * (self.num_iterations - state.iteration)),
            extra=PROGRESS,
        )
        if self._scalars is not None:
            values = {f"train/{name}": reading.val for name, reading in readings.items()}
            self._guard(self._scalar_path, self._scalars.write, values, step=state.iteration)
        return columns

    def epoch(self, record: Mapping[str, Any], scores: Mapping[str, Score]) -> None:
        """Write the numbers of an epoch; ``epoch`` among them is its own, counted from 1."""
        tests = {name: {"top1": score.top1, "top5": score.top5, **asdict(score)} for name, score in scores.items()}
        terms = " ".join(f"[{name} {value:.3f}]" for name, value in record["train"].items())
        pace, seconds = record["images_per_second"], duration(record["seconds"])
        logger.info("Epoch %d: %s [%.1f images/s] %s", record["epoch"], terms, pace, seconds)
        if self._epochs is not None:
            self._guard(self._epoch_path, self._epochs.write, {**record, "test": tests})
        if self._scalars is not None:
            values = {f"test/{name}_{key}": test[key] for name, test in tests.items() for key in ("top1", "top5")}
            self._guard(self._scalar_path, self._scalars.write, values, step=record["iteration"])
        self._write_page()

    def mistakes(self, weights: str, answers: Answers, dataset: ImageDataset, *, epoch: int) -> None:
        """Keep what the best network so far gets wrong, for the run's page.

        Args:
            weights: Plain (``net``) or averaged (``net_E``).
            answers: Those to the whole test set.
            dataset: The test set.
            epoch: Counted from 1.
        """
        path = mistakes_path(self.folder, weights)

        def write() -> None:
            write_mistakes(path, find_mistakes(answers, dataset, self.class_names, epoch=epoch))

        if self.process.is_logging:
            self._guard(path, write)

    def _write_page(self) -> None:
        path = page_path(self.folder)
        if self.process.is_logging:
            self._guard(path, write_page, path, [self.folder])

    def results(self, state: RunState) -> None:
        """Log the best of each weights, the time and where the files are."""
        best = {name: state.best(name) for name in ("net", "net_E")}
        rows = {f"{name} (best)": found for name, found in best.items() if found is not None}
        log_scores(rows, seconds=state.seconds, place=f"files in {self.folder}")

    def close(self) -> None:
        """Close the files, bring the page up to date, and name those that were dropped."""
        self._write_page()
        if self._scalars is not None:
            self._guard(self._scalar_path, self._scalars.close)
        for name, reason in {**self._guard.failures, **failed_outputs()}.items():
            logger.warning("the log is incomplete: %s could not be written (%s)", name, reason)


def open_log(folder: Path, process: Process) -> None:
    """Start the log file of a run, on the process that logs."""
    if process.is_logging:
        add_log_file(folder / "log.txt")
