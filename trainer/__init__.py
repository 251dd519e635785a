"""Training, testing and predicting: ``run_mode(config, process)``."""

from __future__ import annotations

import difflib
from collections.abc import Callable

from configs import Config
from util.distributed import Process

from .predict import Predictor
from .setup import Run, build_run
from .test import Tester
from .train import train as train_run

__all__ = ["TRAINERS", "Predictor", "Run", "Tester", "build_run", "run_mode"]


def _train(config: Config, process: Process) -> int:
    return train_run(build_run(config, process))


def _test(config: Config, process: Process) -> int:
    return Tester(config, process).run()


def _predict(config: Config, process: Process) -> int:
    return Predictor(config, process).run()


# By the name that a config gives, then by mode.
TRAINERS: dict[str, dict[str, Callable[[Config, Process], int]]] = {
    "CLSTrainer": {"train": _train, "ft": _train, "test": _test, "test_net": _test, "predict": _predict},
}


def run_mode(config: Config, process: Process) -> int:
    """Train, test or predict, by the mode of a configuration.

    Args:
        config: The resolved run. Where it leaves ``nb_classes`` open, the classes are counted: those of the checkpoint
            in mode predict, of the data set in the others.
        process: This process.

    Returns:
        The exit code of the process.

    Raises:
        ValueError: If ``trainer.name`` is unknown, or the run cannot be set up.
        RunError: If the run cannot continue.
    """
    name = config.trainer.name
    if name not in TRAINERS:
        nearest = difflib.get_close_matches(name, TRAINERS, n=1, cutoff=0.0)[0]
        raise ValueError(f"there is no trainer.name={name!r}; the nearest is {nearest!r}")
    return TRAINERS[name][config.mode](config, process)
