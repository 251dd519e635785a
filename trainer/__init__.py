"""Training, testing and predicting: ``build_trainer(config, process).run()``."""

from __future__ import annotations

import difflib

from configs import Config, with_classes
from data import count_classes
from util.distributed import Process

from .classification import CLSTester, CLSTrainer
from .network import count_head_classes
from .predict import CLSPredictor

__all__ = ["TRAINERS", "CLSPredictor", "CLSTester", "CLSTrainer", "build_trainer"]

# By the name that a config gives: who trains, who tests and who predicts.
TRAINERS = {"CLSTrainer": (CLSTrainer, CLSTester, CLSPredictor)}


def build_trainer(config: Config, process: Process) -> CLSTrainer | CLSTester | CLSPredictor:
    """Set up the run that a config describes.

    Args:
        config: The resolved run. Where it leaves ``nb_classes`` open, the classes are counted: those of the checkpoint
            in mode predict, of the data set in the others.
        process: This process.

    Raises:
        ValueError: If ``trainer.name`` is unknown, or the run cannot be set up.
    """
    name = config.trainer.name
    if name not in TRAINERS:
        nearest = difflib.get_close_matches(name, TRAINERS, n=1, cutoff=0.0)[0]
        raise ValueError(f"there is no trainer.name={name!r}; the nearest is {nearest!r}")
    if config.nb_classes is None:
        count = count_head_classes if config.mode == "predict" else count_classes
        config = with_classes(config, process.on_first(lambda: count(config)))
    trains, tests, predicts = TRAINERS[name]
    if config.mode == "predict":
        return predicts(config, process)
    return trains(config, process) if config.mode in ("train", "ft") else tests(config, process)
