"""How many images of the test set a network gets right, each counted once over all processes."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from data import Batch, TestLoader
from util.distributed import Process
from util.errors import EXIT_USER_ERROR, RunError
from util.logging import PROGRESS, progress_bar
from util.meters import Meters

from .precision import Precision
from .signals import SignalWatch
from .stop import SignalError, StopError

__all__ = ["Score", "count_correct", "evaluate", "stop_on_signal"]

logger = logging.getLogger(__name__)

MAX_LISTED = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """What a test counted, over all processes."""

    top1_count: int
    top5_count: int
    num_images: int

    @property
    def top1(self) -> float:
        """Share of images whose class came first, in percent."""
        return 100.0 * self.top1_count / self.num_images

    @property
    def top5(self) -> float:
        """Share of images whose class was among the first five, in percent."""
        return 100.0 * self.top5_count / self.num_images

    def __str__(self) -> str:
        return (
            f"top-1 {self.top1:.3f} ({self.top1_count}/{self.num_images}) "
            f"top-5 {self.top5:.3f} ({self.top5_count}/{self.num_images})"
        )


def count_correct(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return how many of logits (B, C) rank their target (B,) first, and among the first five.

    Logits that are not finite rank nothing: such an image is wrong.
    """
    ranked = logits.float().topk(min(5, logits.shape[1]), dim=1).indices
    is_hit = (ranked == targets[:, None]) & logits.isfinite().all(dim=1, keepdim=True)
    return is_hit[:, 0].sum(), is_hit.sum()


@torch.no_grad()
def evaluate(
    network: nn.Module,
    loader: TestLoader,
    *,
    title: str,
    process: Process,
    precision: Precision,
    meters: Meters,
    log_every: int,
    watch: SignalWatch,
    memory_format: torch.memory_format,
) -> Score:
    """Test a network on every image of the test set; a collective.

    Args:
        network: The bare network, not one wrapped for data parallelism, so that shards may differ in length.
        loader: This process's shard.
        title: Names the weights in the log.
        process: This process.
        precision: Gives the autocast context.
        meters: For the log lines; reset first.
        log_every: Batches between two lines, and between two looks at the signals.
        watch: Signals that stop the test.
        memory_format: Of the images.

    Raises:
        StopError: On every process, if any image could not be read.
        SignalError: On every process, if any got a signal.
        RunError: If the count of images is not the test set's.
    """
    was_training = network.training
    network.eval()
    meters.reset()
    # Shards differ by one image at most; a process that is done still takes part in the others' log lines.
    num_batches = max(process.gather_objects(len(loader)))
    counts = torch.zeros(3, dtype=torch.float64, device=process.device)
    unreadable: list[str] = []
    batches = loader.iterate()
    with progress_bar(
        range(1, num_batches + 1), title=f"Test {title}", total=num_batches, is_shown=process.is_logging
    ) as bar:
        for number in bar:
            start = time.perf_counter()
            batch = next(batches, None)
            if batch is not None:
                hits = _count_batch(network, batch, process, precision, memory_format)
                counts += hits
                unreadable += batch.unreadable
                names = ("top1_cnt", "top5_cnt", "top_all")
                meters.update({"batch_t": time.perf_counter() - start, **dict(zip(names, hits, strict=True))})
            if number % log_every == 0 or number == num_batches:
                stop_on_signal(process, watch)
                columns = meters.columns(meters.read(process))
                progress = (title, 100 * number / num_batches, number, num_batches, columns)
                logger.info("Test %s: %.1f%% [%d/%d] %s", *progress, extra=PROGRESS)
    network.train(was_training)
    return _score(process, counts, unreadable, num_images=loader.num_images)


def _count_batch(
    network: nn.Module, batch: Batch, process: Process, precision: Precision, memory_format: torch.memory_format
) -> Tensor:
    """Return the counts of one batch, on the device: first, among the first five, all."""
    images = batch.images.to(process.device, non_blocking=True, memory_format=memory_format)
    targets = batch.targets.to(process.device, non_blocking=True)
    with precision.autocast():
        top1, top5 = count_correct(network(images), targets)
    return torch.stack([top1, top5, torch.full_like(top1, len(targets))]).double()


def stop_on_signal(process: Process, watch: SignalWatch) -> None:
    """Raise a SignalError on every process, if any got a signal; a collective."""
    number = watch.agreed(process.sum(watch.flags()))
    if number is not None:
        raise SignalError(number)


def _score(process: Process, counts: Tensor, unreadable: list[str], *, num_images: int) -> Score:
    paths = sorted(set().union(*process.gather_objects(unreadable)))
    if paths:
        listed = ", ".join(paths[:MAX_LISTED]) + (", ..." if len(paths) > MAX_LISTED else "")
        message = f"{len(paths)} test images cannot be read, so that no score holds; replace them: {listed}"
        raise StopError(message, exit_code=EXIT_USER_ERROR)
    top1, top5, counted = (int(count) for count in process.sum_tensor(counts).tolist())
    if counted != num_images:
        raise RunError(f"{counted} images were counted, but the test set has {num_images}")
    return Score(top1_count=top1, top5_count=top5, num_images=counted)
