"""Training and testing: ``build_trainer(config, process).run()``."""

from __future__ import annotations

import difflib

from configs import Config
from util.distributed import Process

from .classification import CLSTester, CLSTrainer

__all__ = ["TRAINERS", "CLSTester", "CLSTrainer", "build_trainer"]

# By the name that a config gives: who trains, and who tests.
TRAINERS = {"CLSTrainer": (CLSTrainer, CLSTester)}


def build_trainer(config: Config, process: Process) -> CLSTrainer | CLSTester:
    """Set up the run that a config describes.

    Args:
        config: The resolved run.
        process: This process.

    Raises:
        ValueError: If ``trainer.name`` is unknown, or the run cannot be set up.
    """
    name = config.trainer.name
    if name not in TRAINERS:
        nearest = difflib.get_close_matches(name, TRAINERS, n=1, cutoff=0.0)[0]
        raise ValueError(f"there is no trainer.name={name!r}; the nearest is {nearest!r}")
    trains, tests = TRAINERS[name]
    return trains(config, process) if config.mode in ("train", "ft") else tests(config, process)
