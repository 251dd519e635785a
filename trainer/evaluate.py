"""Top-1 and top-5 accuracy of a network on the test set, each image counted once over all processes."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from configs import Config
from data import Batch, TestLoader
from model.messages import listed
from util.distributed import Process
from util.errors import EXIT_USER_ERROR, RunError
from util.logging import PROGRESS, progress_bar
from util.meters import Meters

from .network import memory_format
from .precision import Precision
from .stop import SignalWatch, StopError, stop_on_signal

__all__ = ["MAX_LISTED", "AnswerSheet", "Answers", "Evaluator", "Score", "build_evaluator", "count_correct"]

logger = logging.getLogger(__name__)

MAX_LISTED = 10  # file names in a message


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """Counts of a test, over all processes."""

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


@dataclass(frozen=True, kw_only=True, slots=True)
class Answers:
    """A network's answers to the whole test set, in its order.

    Attributes:
        targets: The images' classes (N,), int64.
        predicted: The most probable classes (N,), int64; -1 where the logits are not finite.
        confidence: Their probabilities (N,), float64.
    """

    targets: np.ndarray
    predicted: np.ndarray
    confidence: np.ndarray


class AnswerSheet:
    """Collects the answers of this process's images, on their device."""

    def __init__(self) -> None:
        self._batches: list[Tensor] = []

    def add(self, logits: Tensor, targets: Tensor) -> None:
        """Note the first class of logits (B, C) beside the targets (B,)."""
        first = _first_classes(logits)[:, :1]
        confidence = logits.double().softmax(1).gather(1, first)[:, 0]
        predicted = first[:, 0].where(logits.isfinite().all(dim=1), -1)
        self._batches.append(torch.stack([targets.double(), predicted.double(), confidence]))

    def gather(self, process: Process) -> Answers:
        """Return the answers of all processes; a collective."""
        own = torch.cat(self._batches, dim=1).cpu().numpy() if self._batches else np.zeros((3, 0))
        shares = process.gather_objects(own)
        together = np.empty((3, sum(share.shape[1] for share in shares)))
        for rank, share in enumerate(shares):
            together[:, rank :: process.world_size] = share
        targets, predicted = together[:2].astype(np.int64)
        return Answers(targets=targets, predicted=predicted, confidence=together[2])


def _first_classes(logits: Tensor) -> Tensor:
    """Return the first five classes of logits (B, C), or all if they are fewer."""
    return logits.float().topk(min(5, logits.shape[1]), dim=1).indices


def count_correct(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return how many of logits (B, C) rank their target (B,) first, and among the first five.

    An image whose logits are not finite counts as wrong.
    """
    ranked = _first_classes(logits)
    is_hit = (ranked == targets[:, None]) & logits.isfinite().all(dim=1, keepdim=True)
    return is_hit[:, 0].sum(), is_hit.sum()


@dataclass(kw_only=True, slots=True)
class Evaluator:
    """Tests networks on every image of the test set.

    Attributes:
        loader: This process's shard.
        process: This process.
        precision: Gives the autocast context.
        meters: For the log lines; reset before each test.
        log_every: Batches between two lines, and between two looks at the signals.
        watch: Signals that stop a test.
        memory_format: Memory format of the images.
    """

    loader: TestLoader
    process: Process
    precision: Precision
    meters: Meters
    log_every: int
    watch: SignalWatch
    memory_format: torch.memory_format

    @torch.no_grad()
    def __call__(self, network: nn.Module, *, title: str, sheet: AnswerSheet | None = None) -> Score:
        """Test a network; a collective.

        Args:
            network: The bare network, not one wrapped for data parallelism, so that shards may differ in length.
            title: Names the weights in the log.
            sheet: Collects every answer.

        Raises:
            StopError: On every process, if any image could not be read.
            SignalError: On every process, if any got a signal.
            RunError: If the count of images is not the test set's.
        """
        process = self.process
        was_training = network.training
        network.eval()
        self.meters.reset()
        # Shards differ by one image at most; a process that is done still takes part in the others' log lines.
        num_batches = max(process.gather_objects(len(self.loader)))
        counts = torch.zeros(3, dtype=torch.float64, device=process.device)
        unreadable: list[str] = []
        batches = self.loader.iterate()
        numbers = range(1, num_batches + 1)
        with progress_bar(numbers, title=f"Test {title}", total=num_batches, is_shown=process.is_logging) as bar:
            for number in bar:
                start = time.perf_counter()
                batch = next(batches, None)
                if batch is not None:
                    hits = self._count(network, batch, sheet)
                    counts += hits
                    unreadable += [f"{name} ({cause})" for name, cause in batch.unreadable.items()]
                    names = ("top1_cnt", "top5_cnt", "top_all")
                    self.meters.update({"batch_t": time.perf_counter() - start, **dict(zip(names, hits, strict=True))})
                if number % self.log_every == 0 or number == num_batches:
                    self._log(title, number, num_batches)
        network.train(was_training)
        return self._score(counts, unreadable)

    def _count(self, network: nn.Module, batch: Batch, sheet: AnswerSheet | None) -> Tensor:
        """Return the counts of one batch, on the device: first, among the first five, all."""
        images = batch.images.to(self.process.device, non_blocking=True, memory_format=self.memory_format)
        targets = batch.targets.to(self.process.device, non_blocking=True)
        with self.precision.autocast():
            logits = network(images)
            top1, top5 = count_correct(logits, targets)
        if sheet is not None:
            sheet.add(logits, targets)
        return torch.stack([top1, top5, torch.full_like(top1, len(targets))]).double()

    def _log(self, title: str, number: int, num_batches: int) -> None:
        stop_on_signal(self.process, self.watch)
        columns = self.meters.columns(self.meters.read(self.process))
        progress = (title, 100 * number / num_batches, number, num_batches, columns)
        logger.info("Test %s: %.1f%% [%d/%d] %s", *progress, extra=PROGRESS)

    def _score(self, counts: Tensor, unreadable: list[str]) -> Score:
        paths = sorted(set().union(*self.process.gather_objects(unreadable)))
        if paths:
            message = f"{len(paths)} test images cannot be read, so that no score holds; replace them: "
            raise StopError(message + listed(paths, MAX_LISTED), exit_code=EXIT_USER_ERROR)
        top1, top5, counted = (int(count) for count in self.process.sum_tensor(counts).tolist())
        if counted != self.loader.num_images:
            raise RunError(f"{counted} images were counted, but the test set has {self.loader.num_images}")
        return Score(top1_count=top1, top5_count=top5, num_images=counted)


def build_evaluator(
    config: Config, process: Process, *, loader: TestLoader, precision: Precision, watch: SignalWatch
) -> Evaluator:
    """Return the evaluator of a run."""
    return Evaluator(
        loader=loader,
        process=process,
        precision=precision,
        meters=Meters(config.logging.log_terms_test),
        log_every=config.logging.test_log_per,
        watch=watch,
        memory_format=memory_format(config.trainer, process.device),
    )
