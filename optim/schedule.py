"""The learning rate over time, on timm's schedulers.

The learning rate is a function of the number of optimiser steps done, before and after an interruption, so there is no
state to lose. Only the plateau schedule has one: the results that it saw.

Its unit of time is one optimiser step (``use_iters``) or one epoch. Warm-up is linear and replaces the start of the
curve, which it does not shift: after it the cosine is where it would be without.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

import torch
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler as TimmScheduler

from configs.schema import Config
from configs.schema import Scheduler as SchedulerConfig

__all__ = ["PlateauSchedule", "Schedule", "build_scheduler"]

logger = logging.getLogger(__name__)

PROGRESS = ("best", "num_bad_tests", "num_reductions")


class PlateauSchedule(TimmScheduler):
    """Warm-up, then a factor ``decay_rate`` each time the metric has not risen for more than ``patience`` tests.

    The rule is torch's ReduceLROnPlateau (larger is better, relative threshold). It is kept apart from the learning
    rates in the optimiser, so that warm-up, noise and layer-wise factors go with it and its state is complete, which
    timm's plateau schedule lacks.

    Args:
        optimizer: Its groups' learning rates are set.
        decay_rate: Factor at each reduction.
        patience: Tests without a rise that are tolerated.
        lr_min: Lower bound of the learning rate.
        warmup_t: Length of the warm-up, in units of t.
        warmup_lr: Learning rate at the start of the warm-up.
        threshold: Relative rise that counts as one.
        **noise: Of timm's base class.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        decay_rate: float,
        patience: int,
        lr_min: float,
        warmup_t: int,
        warmup_lr: float,
        threshold: float = 1e-4,
        **noise: Any,
    ) -> None:
        super().__init__(optimizer, "lr", **noise)
        self.decay_rate = decay_rate
        self.patience = patience
        self.lr_min = lr_min
        self.warmup_t = warmup_t
        self.warmup_lr = warmup_lr
        self.threshold = threshold
        self.best = -math.inf
        self.num_bad_tests = 0
        self.num_reductions = 0

    def observe(self, metric: float) -> None:
        """Count a test's result."""
        if metric > self.best * (1 + self.threshold):
            self.best = metric
            self.num_bad_tests = 0
        else:
            self.num_bad_tests += 1
        if self.num_bad_tests > self.patience:
            self.num_reductions += 1
            self.num_bad_tests = 0

    def _get_lr(self, t: int) -> list[float]:
        if t < self.warmup_t:
            return [self.warmup_lr + t * (base - self.warmup_lr) / self.warmup_t for base in self.base_values]
        factor = self.decay_rate**self.num_reductions
        return [max(base * factor, self.lr_min) for base in self.base_values]


class Schedule:
    """The learning rate of every optimiser step of a run.

    Args:
        scheduler: timm's scheduler, which maps a time to learning rates.
        steps_per_epoch: Optimiser steps in an epoch.
        use_iters: The scheduler's unit of time is an optimiser step, not an epoch.
        epoch_full: Length of the run without cool-down, in epochs.
        num_epochs: Length of the run with cool-down, in epochs.
        lr_cooldown: Learning rate of the cool-down; None keeps the scheduler's.

    Attributes:
        num_epochs: Length of the run with cool-down, in epochs.
    """

    def __init__(
        self,
        scheduler: TimmScheduler,
        *,
        steps_per_epoch: int,
        use_iters: bool,
        epoch_full: int,
        num_epochs: int,
        lr_cooldown: float | None,
    ) -> None:
        self.scheduler = scheduler
        self.steps_per_epoch = steps_per_epoch
        self.use_iters = use_iters
        self.epoch_full = epoch_full
        self.num_epochs = num_epochs
        self.lr_cooldown = lr_cooldown
        self.step(0)

    def step(self, update: int) -> None:
        """Set the learning rates that the optimiser step number ``update``, counted from 0, uses."""
        if update >= self.epoch_full * self.steps_per_epoch and self.lr_cooldown is not None:
            self.scheduler.update_groups(self.lr_cooldown)
        else:
            self.scheduler.step(update if self.use_iters else update // self.steps_per_epoch)

    def epoch_end(self, epoch: int, metric: float | None = None) -> None:
        """Tell the plateau schedule the result of an epoch's test; the other schedules ignore it.

        Args:
            epoch: The epoch that ended, counted from 0. Those within the warm-up do not count.
            metric: Its result, larger is better; None where there was no test.
        """
        if metric is None or not isinstance(self.scheduler, PlateauSchedule):
            return
        num_units = (epoch + 1) * (self.steps_per_epoch if self.use_iters else 1)
        if num_units > self.scheduler.warmup_t:
            self.scheduler.observe(metric)

    def state_dict(self) -> dict[str, Any]:
        """Return the definition of the schedule and the progress of the plateau schedule, as plain values."""
        state = {name: value for name, value in self.scheduler.state_dict().items() if name != "metric"}
        own = {name: value for name, value in vars(self).items() if name != "scheduler"}
        return state | own | {"schedule": type(self.scheduler).__name__}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the progress of the plateau schedule.

        The schedule itself stays the configuration's; a warning names what differs from the state's.
        """
        differences = []
        for name, value in self.state_dict().items():
            if name not in state or state[name] == value:
                continue
            if isinstance(self.scheduler, PlateauSchedule) and name in PROGRESS:
                setattr(self.scheduler, name, state[name])
            else:
                differences.append(f"{name} {state[name]} -> {value}")
        if differences:
            logger.warning("the learning rate schedule is not the checkpoint's: %s", "; ".join(differences))


def build_scheduler(config: Config, optimizer: torch.optim.Optimizer, *, steps_per_epoch: int) -> Schedule:
    """Build the schedule that ``trainer.scheduler_kwargs`` names, and set the learning rate of the first step.

    Args:
        config: The resolved run.
        optimizer: Its groups' learning rates are set, times their ``lr_scale`` where they have one.
        steps_per_epoch: Optimiser steps in an epoch, after gradient accumulation.

    Raises:
        ValueError: The entries do not go together, or an epoch has no step.
    """
    settings = config.trainer.scheduler_kwargs
    epoch_full = config.trainer.epoch_full
    if steps_per_epoch < 1:
        raise ValueError(
            "there is nothing to train: an epoch has no optimiser step; are there fewer images than "
            "trainer.data.batch_size?"
        )
    _check(settings)
    scheduler = _build(
        settings, optimizer, epoch_full=epoch_full, per_epoch=steps_per_epoch if settings.use_iters else 1
    )
    return Schedule(
        scheduler,
        steps_per_epoch=steps_per_epoch,
        use_iters=settings.use_iters,
        epoch_full=epoch_full,
        num_epochs=epoch_full + settings.cooldown_epochs + math.ceil(settings.cooldown_iters / steps_per_epoch),
        lr_cooldown=None if settings.name == "none" else settings.lr_min,
    )


def _build(
    settings: SchedulerConfig, optimizer: torch.optim.Optimizer, *, epoch_full: int, per_epoch: int
) -> TimmScheduler:
    """Build timm's scheduler; ``per_epoch`` is the number of its units of time in an epoch."""
    length = epoch_full * per_epoch
    warmup = settings.warmup_iters if settings.warmup_iters >= 0 else settings.warmup_epochs * per_epoch
    if settings.name == "none":
        warmup = 0
    if warmup > length:
        raise ValueError(
            f"trainer.scheduler_kwargs: the warm-up takes {warmup / per_epoch:g} epochs, but the run has {epoch_full}: "
            "shorten warmup_epochs (warmup_iters), or raise epoch_full"
        )
    noise = {"noise_pct": settings.noise_pct, "noise_std": settings.noise_std, "noise_seed": settings.noise_seed}
    if settings.name == "plateau":
        return PlateauSchedule(
            optimizer,
            decay_rate=settings.decay_rate,
            patience=settings.patience_epochs,
            lr_min=settings.lr_min,
            warmup_t=warmup,
            warmup_lr=settings.warmup_lr,
            noise_range_t=settings.lr_noise and [share * length for share in settings.lr_noise],
            **noise,
        )
    # All times are given in the scheduler's own unit, which timm's factory takes for epochs: that keeps a warm-up
    # of any number of iterations exact.
    scheduler, _ = create_scheduler_v2(
        optimizer,
        "constant" if settings.name == "none" else settings.name,
        num_epochs=length,
        decay_epochs=settings.decay_iters or settings.decay_epochs * per_epoch,
        # timm lets a milestone m take effect at m - 1.
        decay_milestones=[epoch * per_epoch + 1 for epoch in sorted(settings.decay_milestones)],
        decay_rate=settings.decay_rate,
        min_lr=settings.lr_min,
        warmup_lr=settings.warmup_lr,
        warmup_epochs=warmup,
        noise=settings.lr_noise,
        cycle_decay=settings.cycle_decay,
        **noise,
    )
    return scheduler


def _check(settings: SchedulerConfig) -> None:
    """Refuse entries that do not go together."""
    where = "trainer.scheduler_kwargs"
    if settings.name == "step" and not (settings.decay_iters > 0 or settings.decay_epochs > 0):
        raise ValueError(f"{where}: the step schedule needs decay_epochs or decay_iters above 0")
    if settings.name == "multistep" and not settings.decay_milestones:
        raise ValueError(f"{where}: the multistep schedule needs decay_milestones, a list of epochs")
    if settings.patience_iters > 0:
        raise ValueError(f"{where}.patience_iters: the plateau schedule counts tests; set patience_epochs")
    if not settings.use_iters and (
        settings.warmup_iters >= 0 or settings.cooldown_iters > 0 or settings.decay_iters > 0
    ):
        raise ValueError(
            f"{where}: with use_iters=false times are counted in epochs; set warmup_epochs, cooldown_epochs and "
            "decay_epochs rather than warmup_iters, cooldown_iters and decay_iters"
        )
