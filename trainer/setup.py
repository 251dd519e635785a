"""The parts of a training run, built and handed over in one straight line.

classes, folder, log -> network, frozen parts -> average -> data parallelism -> optimiser -> loss -> data -> schedule
-> resume
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn

from configs import Config, save_config, to_dict, with_classes
from configs.overrides import get_entry
from configs.schema import LogTerm
from data import ImageDataset, Loaders, build_loaders, count_classes, describe_workers, find_class_names, open_first
from loss import build_loss, build_mixup
from optim import Schedule, build_optimizer, build_scheduler
from util.distributed import Process
from util.logging import FILE_ONLY
from util.memory import keep_freed_memory
from util.meters import Meters
from util.seed import seed_everything
from util.trackers import MlflowLog, WandbLog, require

from .average import WeightAverage
from .evaluate import Evaluator, build_evaluator
from .freeze import FrozenParts
from .network import build_network, wrap_parallel
from .precision import Precision, build_precision
from .profiler import StepProfiler
from .report import Report, log_environment, log_network, open_log
from .resume import AUTO, newest_run, unsaved_run
from .run_folder import make_run_folder
from .snapshot import RunState, Saver
from .step import Objective, Stepper
from .stop import SignalWatch

__all__ = ["Run", "build_run", "fill_classes"]

logger = logging.getLogger(__name__)


@dataclass(kw_only=True, slots=True)
class Run:
    """The parts of a training run.

    Attributes:
        config: The resolved run, with the classes counted.
        process: This process.
        folder: The run's folder.
        precision: Number format, with its scaler.
        network: The bare network.
        frozen: Its parts that do not learn.
        average: The running average of its weights, if any.
        optimizer: The optimiser of the bare network.
        loaders: The batches to train and to test on.
        schedule: The learning rate over time.
        watch: Signals that stop the run.
        stepper: Does an optimiser step.
        evaluator: Tests a network.
        meters: Values of the log's lines.
        epoch_meters: Terms of the loss, over the epoch so far.
        saver: Writes the checkpoints.
        state: The counters.
        report: Writes the log.
        profiler: Profiles some steps, if so wanted.
        start: When the run would have started without its interruptions, on the clock of ``time.perf_counter``.
        num_steps: Optimiser steps since the run was started or resumed.
    """

    config: Config
    process: Process
    folder: Path
    precision: Precision
    network: nn.Module
    frozen: FrozenParts
    average: WeightAverage | None
    optimizer: torch.optim.Optimizer
    loaders: Loaders
    schedule: Schedule
    watch: SignalWatch
    stepper: Stepper
    evaluator: Evaluator
    meters: Meters
    epoch_meters: Meters
    saver: Saver
    state: RunState
    report: Report
    profiler: StepProfiler
    start: float
    num_steps: int = 0


def build_run(config: Config, process: Process) -> Run:
    """Build every part of a training run, and put it back to where it was if it resumes.

    Args:
        config: The resolved run, in mode train or ft.
        process: This process.

    Raises:
        ValueError: If an entry, a checkpoint or the data are not fit for the run.
        OSError: If the run's folder cannot be written to.
    """
    trackers = _trackers(config)
    config, dataset = fill_classes(config, process)
    if process.device.type == "cpu":
        keep_freed_memory()
    # All processes build the same network; only then do their random numbers part.
    seed_everything(config.seed, deterministic=config.trainer.cuda_deterministic)
    folder, is_resumed = _open_folder(config, process)
    precision = build_precision(config.trainer, process.device)
    log_environment(config, process, precision)

    network = build_network(config, process)
    frozen = FrozenParts(network, config.model.freeze)
    log_network(config.model.name, network)
    decay = config.trainer.ema
    average = None if decay is None else WeightAverage(network, decay=decay)
    parallel = wrap_parallel(config, network, process)

    optimizer = build_optimizer(config, network)
    precision.prepare(network, optimizer)
    objective = _build_objective(config, process, parallel or network)
    loaders = _build_loaders(config, process, dataset)
    _check_smallest_batch(config, process, network, loaders.train.smallest_batch)
    schedule = _build_schedule(config, optimizer, num_batches=len(loaders.train))

    watch = SignalWatch()
    stepper = Stepper(
        config,
        process,
        network=network,
        parallel=parallel,
        optimizer=optimizer,
        average=average,
        precision=precision,
        compute_loss=objective,
        watch=watch,
    )
    evaluator = build_evaluator(config, process, loader=loaders.test, precision=precision, watch=watch)
    meters = Meters(config.logging.log_terms_train)
    epoch_meters = Meters([LogTerm(name=name) for name in objective.loss.names])
    saver = Saver(
        config,
        process,
        folder=folder,
        network=network,
        average=average,
        optimizer=optimizer,
        schedule=schedule,
        precision=precision,
        meters={"train": meters, "epoch": epoch_meters},
        loaders=loaders,
    )
    state = _start_or_resume(config, process, saver, schedule, is_resumed=is_resumed)
    return Run(
        config=config,
        process=process,
        folder=folder,
        precision=precision,
        network=network,
        frozen=frozen,
        average=average,
        optimizer=optimizer,
        loaders=loaders,
        schedule=schedule,
        watch=watch,
        stepper=stepper,
        evaluator=evaluator,
        meters=meters,
        epoch_meters=epoch_meters,
        saver=saver,
        state=state,
        report=_open_report(config, process, folder, state, schedule, loaders, trackers),
        profiler=StepProfiler(
            config.trainer.profiled_steps if process.is_logging else range(0), folder, process.device
        ),
        start=time.perf_counter() - state.seconds,
    )


def fill_classes(config: Config, process: Process) -> tuple[Config, ImageDataset | None]:
    """Return the configuration with the classes counted where it leaves ``nb_classes`` open, and the data set if so.

    Only rank 0 counts; the others have no data set yet.
    """
    if config.nb_classes is not None:
        return config, None
    opened: list[ImageDataset] = []

    def count() -> int:
        opened.append(open_first(config))
        return count_classes(opened[0])

    filled = with_classes(config, process.on_first(count))
    return filled, opened[0] if opened else None


def _open_folder(config: Config, process: Process) -> tuple[Path, bool]:
    """Return the run's folder, and whether it is that of a run to resume."""
    options = config.trainer

    def make() -> tuple[str, bool, bool]:
        is_auto = options.resume_dir == AUTO
        saved = newest_run(config) if is_auto else options.resume_dir
        unsaved = unsaved_run(config) if is_auto and not saved else None
        folder = make_run_folder(options.checkpoint, config.model.name, resume_dir=saved or unsaved or "")
        return str(folder), bool(saved), bool(unsaved)

    name, is_resumed, is_unsaved = process.on_first(make)
    folder = Path(name)
    open_log(folder, process)
    if is_unsaved:
        logger.info("the run in %s ended before its first checkpoint: it starts again in this folder", folder)
    return folder, is_resumed


def _build_objective(config: Config, process: Process, network: nn.Module) -> Objective:
    return Objective(
        network=torch.compile(network) if config.trainer.compile else network,
        mixup=build_mixup(config),
        loss=build_loss(config).to(process.device),
    )


def _build_loaders(config: Config, process: Process, first: ImageDataset | None) -> Loaders:
    loaders = build_loaders(
        config, rank=process.rank, world_size=process.world_size, device_type=process.device.type, first=first
    )
    options = config.trainer.data
    logger.info(
        "train: %d batches of %d images per process and epoch, %d in all per step; %s",
        len(loaders.train),
        options.batch_size_per_gpu,
        options.batch_size,
        describe_workers(config, loaders.train.num_workers),
    )
    return loaders


def _check_smallest_batch(config: Config, process: Process, network: nn.Module, size: int) -> None:
    """Refuse a batch of one image, the only one or the last one of an epoch, whose statistics BatchNorm cannot take."""
    is_shared = process.is_distributed and config.trainer.sync_BN != "none"
    has_batch_norm = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in network.modules())
    if size > 1 or is_shared or not has_batch_norm:
        return
    is_last = config.trainer.data.batch_size_per_gpu > 1
    raise ValueError(
        f"{'the last' if is_last else 'a'} training batch of an epoch holds 1 image per process, and BatchNorm needs "
        f"several for its statistics: {'set trainer.data.drop_last=true' if is_last else 'set a larger batch_size'}"
    )


def _build_schedule(config: Config, optimizer: torch.optim.Optimizer, *, num_batches: int) -> Schedule:
    num_micro = config.trainer.accumulation_steps
    steps_per_epoch = num_batches // num_micro
    if steps_per_epoch == 0:
        raise ValueError(
            f"the training set makes {num_batches} batches a process, less than one step of "
            f"trainer.accumulation_steps={num_micro}; use a smaller batch_size"
        )
    return build_scheduler(config, optimizer, steps_per_epoch=steps_per_epoch)


def _start_or_resume(
    config: Config, process: Process, saver: Saver, schedule: Schedule, *, is_resumed: bool
) -> RunState:
    """Return a run's counters, and put one that resumes back where it was.

    Random states come last, so that nothing draws from them before.
    """
    seed_everything(config.seed, rank=process.rank, deterministic=config.trainer.cuda_deterministic)
    if not is_resumed:
        return RunState()
    state = saver.resume(steps_per_epoch=schedule.steps_per_epoch)
    logger.info(
        "resumes from %s, after %d of %d epochs and %d steps, iteration %d",
        saver.last_good,
        state.epoch,
        schedule.num_epochs,
        state.step,
        state.iteration,
    )
    return state


def _trackers(config: Config) -> dict[str, type[WandbLog] | type[MlflowLog]]:
    """Return the trackers that the configuration asks for, by its entry."""
    trackers: dict[str, type[WandbLog] | type[MlflowLog]] = {}
    if config.logging.wandb:
        require("logging.wandb", "wandb", "wandb")
        trackers["logging.wandb"] = WandbLog
    if config.logging.mlflow:
        require("logging.mlflow", "mlflow", "mlflow-skinny")
        trackers["logging.mlflow"] = MlflowLog
    return trackers


def _open_report(
    config: Config,
    process: Process,
    folder: Path,
    state: RunState,
    schedule: Schedule,
    loaders: Loaders,
    trackers: Mapping[str, type[WandbLog] | type[MlflowLog]],
) -> Report:
    logger.info("config %s", json.dumps(to_dict(config), indent=1), extra=FILE_ONLY)
    process.on_first(lambda: save_config(config, folder / "config.yaml"))
    logger.info("files go to %s", folder)
    assert config.nb_classes is not None, "a resolved configuration has it"
    tree = to_dict(config)
    return Report(
        folder,
        process,
        state,
        num_epochs=schedule.num_epochs,
        steps_per_epoch=schedule.steps_per_epoch,
        class_names=find_class_names(loaders.class_names, config.data, num_classes=config.nb_classes).words,
        trackers={name: partial(tracker, folder, get_entry(config, name), tree) for name, tracker in trackers.items()},
    )
