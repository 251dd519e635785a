"""The steps of a report, the most wanted first, each with its time on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

__all__ = ["STEPS", "Step", "cases_of"]


@dataclass(frozen=True, kw_only=True)
class Step:
    """A part of a report that has its own process.

    Attributes:
        name: What it is called on the command line and in the file.
        title: One line on what it does.
        seconds: How long it is planned to take on a GPU.
        limit: Seconds after which it is stopped there.
        function: Module of this package and function that yields its cases.
        is_behind: It runs beside the steps that follow, up to the next one that is timed.
        is_timed: Nothing else may run beside it.
    """

    name: str
    title: str
    seconds: int
    limit: int
    function: tuple[str, str]
    is_behind: bool = False
    is_timed: bool = False


def _step(name: str, function: str, title: str, seconds: int, limit: int, **options: bool) -> Step:
    module, attribute = function.split(".")
    return Step(name=name, title=title, seconds=seconds, limit=limit, function=(module, attribute), **options)


STEPS = {
    step.name: step
    for step in (
        _step("environment", "environment.environment", "machine, backends, rate of a copy", 15, 120, is_timed=True),
        _step("compile", "compilation.compilation", "compile in parallel what is timed later", 90, 180, is_behind=True),
        _step("exactness", "checks.exactness", "scan at all production shapes against float64, twice", 50, 120),
        _step("operators", "checks.operators", "opcheck, fullgraph, CUDA graph, released logits", 25, 70),
        _step("core", "scans.core", "scan at the full batch beside the memory's rate", 40, 90, is_timed=True),
        _step("throughput", "networks.throughput", "networks at the full batch, every mode", 60, 130, is_timed=True),
        _step("profile", "networks.profiles", "the kernels that take longest", 20, 60, is_timed=True),
        _step("latency", "networks.latency", "one image", 20, 60, is_timed=True),
        _step("training", "training.training", "steps in AMP: speed, memory, loss", 60, 130, is_timed=True),
        _step("programs", "runs.programs", "run.py on digits: train, stop, resume, test, compile", 60, 150),
        _step("process_group", "training.process_group", "collectives and DDP in a group of one", 12, 50),
        _step("sanitizer", "runs.sanitizer", "memcheck and racecheck on small shapes", 40, 100),
        _step("peers", "networks.peers", "other networks, measured alike", 40, 100, is_timed=True),
        _step("triton", "scans.triton", "the Triton kernels, checked and timed", 25, 70, is_timed=True),
        _step("convolutions", "networks.convolutions", "every convolution in both layouts", 15, 50, is_timed=True),
        _step("batches", "scans.other_batches", "scan with fewer images", 30, 80, is_timed=True),
        _step("more", "networks.more_networks", "other variants and number formats", 60, 120, is_timed=True),
        _step("tests", "runs.tests", "pytest -m gpu, where pytest is installed", 120, 300),
    )
}


def cases_of(step: Step) -> Callable[..., object]:
    """Return the function that yields a step's cases."""
    module, name = step.function
    return getattr(import_module(f".{module}", __package__), name)
