"""One optimiser step over micro-batches and processes, skipped on all of them when a number in it is not finite."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from timm.data import Mixup
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from configs.schema import Config
from data import Batch
from loss import LossTerms
from optim import clip_gradients
from util.distributed import Process

from .average import WeightAverage
from .batchnorm import StatisticsKeeper
from .network import memory_format
from .precision import Precision
from .stop import WATCHED, SignalWatch
from .transfer import Transfer

__all__ = ["Objective", "StepResult", "Stepper"]

ComputeLoss = Callable[[Tensor, Tensor], tuple[Tensor, dict[str, Tensor]]]


@dataclass(kw_only=True, slots=True)
class Objective:
    """The loss of a batch of images: mixup, the network, the weighted terms.

    Attributes:
        network: The network as a training step calls it: bare, or wrapped for data parallelism, compiled if so wanted.
        loss: The terms; a teacher that one compares with is part of them.
        mixup: Mixes images and targets; None leaves them as they are.
    """

    network: nn.Module
    loss: LossTerms
    mixup: Mixup | None

    def __call__(self, images: Tensor, targets: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of images (B, 3, H, W) with class indices (B,), and its terms."""
        if self.mixup is not None:
            images, targets = self.mixup(images, targets)
        outputs = self.network(images)
        return self.loss(images, outputs, targets)


class _Readback:
    """Numbers on their way from the device to the host.

    Args:
        values: (N,).
    """

    def __init__(self, values: Tensor) -> None:
        self._arrived: torch.cuda.Event | None = None
        self._values = values
        if values.is_cuda:
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def read(self) -> list[float]:
        """Wait for the numbers and return them."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._values.tolist()


@dataclass(kw_only=True, slots=True)
class StepResult:
    """The outcome of one step.

    Attributes:
        terms: Terms of the loss on this process, averaged over its micro-batches.
        num_images: Images of this process.
        is_skipped: Whether the step was skipped.
        is_bad: Whether it was skipped for a reason other than the loss scale.
        cause: Why it was skipped.
        signal: A signal that one of the processes got.
        unreadable: Files that could not be read, over all processes once it is settled.
        seconds: Time in ``data_t`` (waiting for images), ``optim_t`` (computing) and ``batch_t`` (both).
        pending: Numbers that a GPU has not delivered yet, on which all attributes but the first two depend. None once
            the step is settled.
    """

    terms: dict[str, Tensor] = field(default_factory=dict)
    num_images: int = 0
    is_skipped: bool = False
    is_bad: bool = False
    cause: str = ""
    signal: int | None = None
    unreadable: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    pending: _Readback | None = None


class Stepper:
    """Does optimiser steps.

    Args:
        config: The resolved run.
        process: This process.
        network: The bare network.
        parallel: The wrapper that exchanges gradients between processes, if there is one.
        optimizer: The optimiser of the bare network.
        average: The running average of the weights, if any.
        precision: Number format.
        compute_loss: From images and targets on the device to the loss and its terms; an `Objective`.
        watch: Signals to share with the other processes.

    Attributes:
        is_deferred: Whether the device decides if a step is done: then only `settle` waits for it.
    """

    def __init__(
        self,
        config: Config,
        process: Process,
        *,
        network: nn.Module,
        parallel: DistributedDataParallel | None,
        optimizer: torch.optim.Optimizer,
        average: WeightAverage | None,
        precision: Precision,
        compute_loss: ComputeLoss,
        watch: SignalWatch,
    ) -> None:
        self.process = process
        self.network = network
        self.parallel = parallel
        self.optimizer = optimizer
        self.average = average
        self.precision = precision
        self.compute_loss = compute_loss
        self.watch = watch
        self.num_micro = config.trainer.accumulation_steps
        self.transfer = Transfer(process.device, memory_format(config.trainer, process.device))
        self.graph = {"create_graph": config.loss.create_graph, "retain_graph": config.loss.retain_graph}
        self.clip = config.loss.clip_grad
        self.clip_mode = config.loss.clip_mode
        self.parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
        self.clipped = self._clipped_parameters() if self.clip_mode == "agc" else self.parameters
        self.statistics = StatisticsKeeper(network)
        self.is_deferred = process.device.type == "cuda" and precision.can_skip_by_itself(optimizer)

    def __call__(self, batches: Iterator[Batch]) -> StepResult:
        """Take micro-batches from ``batches`` and do one step; a collective.

        On a GPU, with an optimiser that can skip a step by itself, nothing waits: the result has to be settled.
        """
        result = StepResult(seconds={"data_t": 0.0})
        start = time.perf_counter()
        self.statistics.keep()
        loss = torch.zeros((), device=self.process.device)
        for index in range(self.num_micro):
            loss += self._accumulate(batches, result, is_last=index + 1 == self.num_micro)
        self.precision.unscale(self.optimizer)
        norm = self._gradient_norm()
        found = self._exchange_findings(loss, norm, result)
        if self.is_deferred:
            result.pending = _Readback(self._apply_on_device(found))
        else:
            with self.process.waiting():
                numbers = found.tolist()
            self._apply(numbers, result)
        self.optimizer.zero_grad(set_to_none=True)
        result.seconds["batch_t"] = time.perf_counter() - start
        result.seconds["optim_t"] = result.seconds["batch_t"] - result.seconds["data_t"]
        return result

    def settle(self, result: StepResult) -> None:
        """Wait for what a step has found, on a GPU; a collective."""
        if result.pending is None:
            return
        start = time.perf_counter()
        with self.process.waiting():
            *found, is_bad = result.pending.read()
        result.pending = None
        self._note(found, result, is_bad=bool(is_bad))
        waited = time.perf_counter() - start
        for name in ("batch_t", "optim_t"):
            result.seconds[name] += waited

    def _accumulate(self, batches: Iterator[Batch], result: StepResult, *, is_last: bool) -> Tensor:
        """Add one micro-batch's gradient; gradients are exchanged with the last one."""
        start = time.perf_counter()
        batch = next(batches)
        result.seconds["data_t"] += time.perf_counter() - start
        result.unreadable += batch.unreadable
        result.num_images += len(batch.targets)
        images, targets = self.transfer(batch)
        with self._exchange(is_last=is_last):
            with self.precision.autocast():
                loss, terms = self.compute_loss(images, targets)
            self.precision.backward(loss / self.num_micro, self.optimizer, **self.graph)
        for name, value in terms.items():
            result.terms[name] = result.terms.get(name, 0.0) + value / self.num_micro
        return loss.detach()

    def _exchange(self, *, is_last: bool) -> contextlib.AbstractContextManager[None]:
        if is_last or self.parallel is None:
            return contextlib.nullcontext()
        return self.parallel.no_sync()

    def _gradient_norm(self) -> Tensor:
        """Return the norm of all gradients before clipping, and clip them."""
        if self.clip is not None and self.clip_mode == "norm":
            return clip_gradients(self.parameters, clip=self.clip, mode="norm")
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if self.clip is not None:
            clip_gradients(self.clipped, clip=self.clip, mode=self.clip_mode)
        return norm

    def _exchange_findings(self, loss: Tensor, norm: Tensor, result: StepResult) -> Tensor:
        """Sum up, in the one collective of a step, everything that the processes must act on together.

        Returns:
            How many losses and gradients are not finite, how many files could not be read, who got which signal:
            (3 + number of watched signals,) in float64, on the device.
        """
        found = torch.stack([~loss.isfinite(), ~norm.isfinite()]).double()
        reports = torch.tensor([len(result.unreadable), *self.watch.flags()], dtype=torch.float64)
        if found.is_cuda:
            reports = reports.pin_memory()
        return self.process.sum_tensor(torch.cat([found, reports.to(found.device, non_blocking=True)]))

    def _apply(self, found: list[float], result: StepResult) -> None:
        """Do the step, or leave everything as it was before."""
        is_bad = False
        if found[0] == 0 and found[1] == 0:
            self.precision.step(self.optimizer)
            if self.average is not None:
                self.average.update(self.network)
        else:
            is_bad = not self.precision.skip(self.optimizer, is_overflow=found[0] == 0)
            self.statistics.restore()
        self._note(found, result, is_bad=is_bad)

    def _apply_on_device(self, found: Tensor) -> Tensor:
        """Do as `_apply`, but let the device decide, which has the answer first.

        Returns:
            ``found``, and whether the step was skipped for a reason other than the loss scale.
        """
        is_bad_loss, is_skipped = found[0] > 0, found[:2].sum() > 0
        is_bad = self.precision.step_unless(self.optimizer, is_bad_loss, is_skipped)
        self.statistics.restore_if(is_skipped)
        if self.average is not None:
            self.average.update_unless(self.network, is_skipped)
        return torch.cat([found, is_bad.double().view(1)])

    def _note(self, found: list[float], result: StepResult, *, is_bad: bool) -> None:
        """Put what all processes have found into a result."""
        num_bad_losses, num_bad_norms, num_unreadable = found[:3]
        result.is_skipped = num_bad_losses + num_bad_norms > 0
        result.is_bad = is_bad
        if result.is_skipped:
            finite = "the loss is not finite" if num_bad_losses else "the loss is finite, its gradient is not"
            result.cause = finite if is_bad else "gradients overflow, the loss scale backs off"
        result.signal = self.watch.agreed(found[-len(WATCHED) :])
        if num_unreadable:
            result.unreadable = sorted(set().union(*self.process.gather_objects(result.unreadable)))

    def _clipped_parameters(self) -> list[nn.Parameter]:
        """Return the parameters without the classifier's, as adaptive clipping wants them (arXiv 2102.06171)."""
        classifier = self.network.get_classifier() if hasattr(self.network, "get_classifier") else None
        heads = classifier if isinstance(classifier, tuple) else (classifier,)
        excluded = {id(parameter) for head in heads if isinstance(head, nn.Module) for parameter in head.parameters()}
        return [parameter for parameter in self.parameters if id(parameter) not in excluded]
