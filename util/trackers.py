"""Experiment trackers, Weights & Biases and MLflow, by their own libraries; both also work without a network.

A tracker is called in a thread of its own, so that one that does not answer holds up no step.
"""

from __future__ import annotations

import importlib.util
import json
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from .logging import LogGuard

__all__ = ["Background", "MlflowLog", "ScalarLogs", "ScalarWriter", "WandbLog", "require"]

PATIENCE_SECONDS = 20.0  # how long a run that has ended waits for a tracker: launchers kill what takes longer
MAX_WAITING = 10_000  # writes that a tracker may be behind


class ScalarWriter(Protocol):
    """Takes numbers of a step, by name."""

    def write(self, values: Mapping[str, float], *, step: int) -> None:
        """Take numbers."""

    def close(self) -> None:
        """Take no more."""


def require(entry: str, library: str, package: str) -> None:
    """Raise a ValueError if the library that an entry of the configuration needs is not installed."""
    if importlib.util.find_spec(library) is None:
        raise ValueError(f"{entry} needs {library}: pip install {package}")


class ScalarLogs:
    """Several logs of numbers as one; one that fails is dropped, and the others continue.

    Args:
        guard: Calls them, and keeps the reason for each that was dropped.
        openers: Open the logs, by name; None of one that there is not.
    """

    def __init__(self, guard: LogGuard, openers: Mapping[object, Callable[[], ScalarWriter | None]]) -> None:
        self._guard = guard
        opened = {name: guard(name, opener) for name, opener in openers.items()}
        self._logs = {name: log for name, log in opened.items() if log is not None}

    def write(self, values: Mapping[str, float], *, step: int) -> None:
        """Write numbers of a step to every log."""
        for name, log in self._logs.items():
            self._guard(name, log.write, values, step=step)

    def close(self) -> None:
        """Close every log."""
        for name, log in self._logs.items():
            self._guard(name, log.close)


class Background:
    """A log that a thread opens and writes to.

    What goes wrong in the thread is raised by the next call.

    Args:
        opener: Opens the log.
    """

    def __init__(self, opener: Callable[[], ScalarWriter]) -> None:
        self._waiting: queue.Queue[tuple[Mapping[str, float], int] | None] = queue.Queue(MAX_WAITING)
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._serve, args=(opener,), name="tracker", daemon=True)
        self._thread.start()

    def write(self, values: Mapping[str, float], *, step: int) -> None:
        """Have numbers written."""
        self._put((values, step))

    def close(self) -> None:
        """Wait until all is written, for `PATIENCE_SECONDS` at most.

        Raises:
            TimeoutError: The log takes longer.
        """
        self._put(None)
        self._thread.join(PATIENCE_SECONDS)
        if self._thread.is_alive():
            raise TimeoutError(f"it does not answer within {PATIENCE_SECONDS:.0f} s")
        if self._error is not None:
            raise self._error

    def _put(self, item: tuple[Mapping[str, float], int] | None) -> None:
        if self._error is not None:
            raise self._error
        try:
            self._waiting.put_nowait(item)
        except queue.Full:
            raise TimeoutError(f"it is {MAX_WAITING} writes behind") from None

    def _serve(self, opener: Callable[[], ScalarWriter]) -> None:
        try:
            log = opener()
            while (item := self._waiting.get()) is not None:
                log.write(item[0], step=item[1])
            log.close()
        except Exception as error:  # whatever the library raises; the next call tells of it
            self._error = error


class WandbLog:
    """A run of Weights & Biases; a resumed run continues it.

    WANDB_MODE=offline needs no network: ``wandb sync`` sends the files later.

    Args:
        folder: The run's folder, whose name is that of the run there.
        project: The project there.
        config: The run's configuration, nested.
    """

    def __init__(self, folder: Path, project: str, config: Mapping[str, Any]) -> None:
        import wandb

        self._run = wandb.init(
            project=project,
            name=folder.name,
            id=folder.name,
            resume="allow",
            dir=str(folder),
            config=dict(config),
            settings=wandb.Settings(console="off", silent=True),  # stdout is the run's own
        )

    def write(self, values: Mapping[str, float], *, step: int) -> None:
        """Write numbers of a step."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


class MlflowLog:
    """A run of MLflow, on the server or in the folder that MLFLOW_TRACKING_URI names; a resumed run continues it.

    Args:
        folder: The run's folder, whose name is that of the run there.
        experiment: The experiment there; made if there is none.
        config: The run's configuration, nested.
    """

    def __init__(self, folder: Path, experiment: str, config: Mapping[str, Any]) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self._metric = Metric
        self._client = MlflowClient()
        found = self._client.get_experiment_by_name(experiment)
        place = self._client.create_experiment(experiment) if found is None else found.experiment_id
        runs = self._client.search_runs([place], f"attributes.run_name = '{folder.name}'")
        if runs:
            self._id = runs[0].info.run_id
        else:
            self._id = self._client.create_run(place, run_name=folder.name).info.run_id
            params = [Param(name, value) for name, value in _flat(config)]
            for start in range(0, len(params), 100):  # the most at a time
                self._client.log_batch(self._id, params=params[start : start + 100])

    def write(self, values: Mapping[str, float], *, step: int) -> None:
        """Write numbers of a step."""
        now = int(1000 * time.time())
        self._client.log_batch(
            self._id, metrics=[self._metric(name, value, now, step) for name, value in values.items()]
        )

    def close(self) -> None:
        """Finish the run."""
        self._client.set_terminated(self._id)


def _flat(tree: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, str]]:
    """Yield the path and the text of every entry of a nested configuration; lists are one entry."""
    for name, value in tree.items():
        place = f"{path}.{name}" if path else str(name)
        if isinstance(value, Mapping) and value:
            yield from _flat(value, place)
        else:
            yield place, json.dumps(value)
