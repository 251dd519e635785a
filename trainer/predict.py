"""A checkpoint's predictions for images without labels: the first classes of each, on screen and in files."""

from __future__ import annotations

import logging
import math

import torch

from configs import Config, with_classes
from data import MODES, Batch, Pictures, TestLoader, find_class_names, worker_failures
from model.messages import listed, printable
from util.distributed import Process
from util.errors import EXIT_USER_ERROR, RunError
from util.logging import progress_bar

from .evaluate import MAX_LISTED
from .explain import Explainer
from .network import build_tested_network, count_head_classes, memory_format, read_weights
from .precision import build_precision
from .predictions import (
    ClassScore,
    Prediction,
    as_text,
    check_output,
    refuse_overwriting,
    write_predictions,
    write_sheet,
)
from .report import log_environment, log_network
from .stop import SignalError, SignalWatch, stop_on_signal

__all__ = ["Predictor"]

logger = logging.getLogger(__name__)


class Predictor:
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
        self.process = process
        self.watch = SignalWatch()
        process.on_first(lambda: check_output(config.predict))
        checkpoint = read_weights(config)
        if config.nb_classes is None:
            config = with_classes(config, count_head_classes(config, checkpoint))
        self.config = config
        self.precision = build_precision(config.trainer, process.device)
        log_environment(config, process, self.precision)
        data = config.data
        self.pictures = Pictures(
            config.predict.input,
            loader_type=data.loader_type,
            max_pixels=data.max_pixels,
            mode=MODES[data.channels],
        )
        process.on_first(lambda: refuse_overwriting(config.predict, self.pictures))
        self.loader = TestLoader(
            self.pictures,
            config,
            rank=process.rank,
            world_size=process.world_size,
            device_type=process.device.type,
        )
        self.network = build_tested_network(config, process, checkpoint, ema=config.model.model_kwargs.ema)
        log_network(config.model.name, self.network)
        saved_names = None if checkpoint is None else checkpoint.get("class_names")
        self.names = find_class_names(saved_names, config.data, num_classes=config.nb_classes)
        logger.info("%d classes, called by %s names", config.nb_classes, self.names.origin)
        self.predictions: list[Prediction] = []

    def run(self) -> int:
        """Predict, show and write; return the exit code.

        Raises:
            RunError: At the end, if an image could not be read, or the network's answer to one is not finite.
        """
        num_workers = self.loader.num_workers
        with self.watch, worker_failures(num_workers, rank=self.process.rank):
            try:
                own = self._predict()
            except SignalError as stop:
                logger.info("%s", stop)
                return stop.exit_code
        shares = self.process.gather_objects(own)
        together = sorted(pair for share in shares for pair in share.items())
        self.predictions = [prediction for _, prediction in together]
        logger.info("%s: %d images\n%s", printable(self.pictures.source), len(together), as_text(self.predictions))
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
        layout = memory_format(self.config.trainer, self.process.device)
        images = batch.images.to(self.process.device, non_blocking=True, memory_format=layout)
        with self.precision.autocast():
            logits = self.network(images)
        shares, classes = logits.double().softmax(1).topk(min(self.config.predict.top_k, logits.shape[1]))
        return [
            [ClassScore(index, self.names.identifiers[index], self.names.words[index], share) for index, share in rows]
            for rows in (zip(*row, strict=True) for row in zip(classes.tolist(), shares.tolist(), strict=True))
        ]

    def _prediction(self, index: int, scores: list[ClassScore], unreadable: dict[str, str]) -> Prediction:
        path = str(self.pictures.path(index))
        name = self.pictures.name(index)
        if name in unreadable:
            return Prediction(path=path, classes=[], error=f"unreadable image ({unreadable[name]})")
        if not all(math.isfinite(score.probability) for score in scores):
            return Prediction(path=path, classes=[], error="the network's answer is not finite")
        return Prediction(path=path, classes=scores)

    def _write(self) -> None:
        options = self.config.predict
        if options.output:
            weights = self.config.model.model_kwargs.checkpoint_path or "pretrained"
            write_predictions(options.output, self.predictions, model=self.config.model.name, weights=weights)
            logger.info("predictions are in %s", options.output)
        if options.sheet:
            explainer = Explainer(self.network, self.config) if options.explain else None
            num_shown = write_sheet(
                options.sheet, self.predictions, self.pictures, limit=options.sheet_images, explainer=explainer
            )
            logger.info("%d of %d images are shown in %s", num_shown, len(self.predictions), options.sheet)

    def _report_failed(self) -> None:
        failed = [printable(prediction.path) for prediction in self.predictions if prediction.error]
        if failed:
            message = f"{len(failed)} of {len(self.predictions)} images have no prediction: "
            raise RunError(message + listed(failed, MAX_LISTED), exit_code=EXIT_USER_ERROR)
