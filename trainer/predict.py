"""What a checkpoint says of images without labels: the first classes of each, on screen and in files."""

from __future__ import annotations

import logging
import math

import torch
from torch import nn

from configs import Config
from data import Batch, Pictures, TestLoader, UnreadableImageError, find_class_names, worker_failures
from model.checkpoint import read_checkpoint
from util.distributed import Process
from util.errors import EXIT_USER_ERROR, RunError
from util.logging import progress_bar

from .evaluate import stop_on_signal
from .network import build_tested_network
from .precision import build_precision
from .predictions import ClassScore, Prediction, as_text, check_output, write_predictions, write_sheet
from .report import log_environment, log_network
from .signals import SignalWatch
from .stop import SignalError

__all__ = ["CLSPredictor"]

logger = logging.getLogger(__name__)

MAX_LISTED = 10


class CLSPredictor:
    """Classifies images; mode predict.

    Args:
        config: The resolved run.
        process: This process; several share the images.

    Attributes:
        predictions: One per image, in the order of the names, once it has run.

    Raises:
        ValueError: If there are no images or no weights, these do not fit, or a file could not be written as asked.
    """

    def __init__(self, config: Config, process: Process) -> None:
        if not config.predict.input:
            raise ValueError("-m predict needs images: give predict.input=PATH, an image, a folder or a glob")
        self.config = config
        self.process = process
        self.watch = SignalWatch()
        process.on_first(lambda: check_output(config.predict))
        self.precision = build_precision(config.trainer, process.device)
        log_environment(config, process, precision=str(self.precision))
        self.pictures = Pictures(config.predict.input, loader_type=config.data.loader_type)
        self.loader = TestLoader(
            self.pictures,
            config,
            rank=process.rank,
            world_size=process.world_size,
            device_type=process.device.type,
        )
        self.network = self._build_network()
        self.predictions: list[Prediction] = []

    def _build_network(self) -> nn.Module:
        config = self.config
        kwargs = config.model.model_kwargs
        network = build_tested_network(config, self.process, ema=kwargs.ema)
        log_network(config.model.name, network)
        saved = read_checkpoint(kwargs.checkpoint_path, mmap=True) if kwargs.checkpoint_path else {}
        self.names = find_class_names(saved.get("class_names"), config.data, num_classes=config.nb_classes)
        logger.info("%d classes, called by %s names", config.nb_classes, self.names.origin)
        return network

    def run(self) -> int:
        """Predict, show and write; return the exit code.

        Raises:
            RunError: At the end, if an image could not be read, or the network's answer to one is not finite.
        """
        with self.watch, worker_failures(self.config.trainer.data.num_workers_per_gpu):
            try:
                own = self._predict()
            except SignalError as stop:
                logger.info("%s", stop)
                return stop.exit_code
        shares = self.process.gather_objects(own)
        together = sorted(pair for share in shares for pair in share.items())
        self.predictions = [prediction for _, prediction in together]
        logger.info("%s: %d images\n%s", self.pictures.source, len(together), as_text(self.predictions))
        self.process.on_first(self._write)
        self._report_failed()
        return 0

    @torch.no_grad()
    def _predict(self) -> dict[int, Prediction]:
        """Return the predictions of this process's images by index; a collective."""
        process = self.process
        num_batches = max(process.gather_objects(len(self.loader)))
        batches = self.loader.iterate()
        indices = iter(range(process.rank, len(self.pictures), process.world_size))
        predictions: dict[int, Prediction] = {}
        with progress_bar(range(num_batches), title="Predict", total=num_batches, is_shown=process.is_logging) as bar:
            for _ in bar:
                batch = next(batches, None)
                if batch is not None:
                    for scores, index in zip(self._classify(batch), indices, strict=False):
                        predictions[index] = self._prediction(index, scores, batch.unreadable)
                stop_on_signal(process, self.watch)
        return predictions

    def _classify(self, batch: Batch) -> list[list[ClassScore]]:
        """Return the most probable classes of every image of a batch."""
        memory_format = torch.channels_last if self.config.trainer.channels_last else torch.contiguous_format
        images = batch.images.to(self.process.device, non_blocking=True, memory_format=memory_format)
        with self.precision.autocast():
            logits = self.network(images)
        shares, classes = logits.double().softmax(1).topk(min(self.config.predict.top_k, logits.shape[1]))
        return [
            [ClassScore(index, self.names.identifiers[index], self.names.words[index], share) for index, share in rows]
            for rows in (zip(*row, strict=True) for row in zip(classes.tolist(), shares.tolist(), strict=True))
        ]

    def _prediction(self, index: int, scores: list[ClassScore], unreadable: list[str]) -> Prediction:
        name = self.pictures.name(index)
        if name in unreadable:
            return Prediction(path=name, classes=[], error=self._cause(index))
        if not all(math.isfinite(score.probability) for score in scores):
            return Prediction(path=name, classes=[], error="the network's answer is not finite")
        return Prediction(path=name, classes=scores)

    def _cause(self, index: int) -> str:
        """Return what is wrong with an image; the data workers tell no more than that something is."""
        try:
            self.pictures.load(index)
        except UnreadableImageError as error:
            return str(error).removeprefix(f"{self.pictures.name(index)}: ")
        return "unreadable image (but not at a second try)"

    def _write(self) -> None:
        options = self.config.predict
        if options.output:
            weights = self.config.model.model_kwargs.checkpoint_path or "pretrained"
            write_predictions(options.output, self.predictions, model=self.config.model.name, weights=weights)
            logger.info("predictions are in %s", options.output)
        if options.sheet:
            num_shown = write_sheet(options.sheet, self.predictions, self.pictures, limit=options.sheet_images)
            logger.info("%d of %d images are shown in %s", num_shown, len(self.predictions), options.sheet)

    def _report_failed(self) -> None:
        failed = [prediction.path for prediction in self.predictions if prediction.error]
        if failed:
            listed = ", ".join(failed[:MAX_LISTED]) + (", ..." if len(failed) > MAX_LISTED else "")
            message = f"{len(failed)} of {len(self.predictions)} images have no prediction: {listed}"
            raise RunError(message, exit_code=EXIT_USER_ERROR)
