"""The variants and other networks in several runtimes, in float32, with weights of 16 bits, and in 8 bits.

    python -m benchmarks.runtimes [--quick] [--batches 1 16] [--networks NAME ...] [--runtimes NAME ...] [--compile]

All cases of a batch size take turns in one process. A runtime or precision that cannot run a network is listed with the
reason. `benchmarks.runtimes_table` makes the tables of docs/deploy.md of the results.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .common import (
    Plan,
    Timing,
    add_arguments,
    describe_machine,
    failure_of,
    main,
    measure,
    save_and_draw,
    set_up,
    speedup,
    summary_line,
    table,
)
from .networks import NAMES, Candidate, build
from .parsers import new_parser
from .runners import PRECISIONS, RUNTIMES, Preparation, Prepared, versions
from .runtimes_table import tables

__all__ = ["Case", "parse", "run"]

logger = logging.getLogger(__name__)

PEERS = ("efficientvit_m5", "mobilenetv4_conv_medium", "repvit_m1_0")
NETWORKS = (*(name for name in NAMES if name.startswith("MobileMamba") and "literal" not in name), *PEERS)
QUICK_NETWORKS = ("MobileMamba_T2", "mobilenetv4_conv_medium")
DEFAULT_RUNTIMES = ("eager", "kernels", "onnxruntime", "openvino")
ALL = "all"


@dataclass(frozen=True)
class Case:
    """One way to run one network.

    Attributes:
        network: One of `NAMES`.
        runtime: One of `RUNTIMES`.
        precision: One of `PRECISIONS`.
    """

    network: str
    runtime: str
    precision: str


def _built(name: str) -> Candidate:
    """Build a network with the same weights in every run, so that its files can be used again."""
    torch.manual_seed(0)
    return build(name)


def _cases(candidate: Candidate, arguments: argparse.Namespace) -> list[Case]:
    """Return the cases that make sense: fewer bits in exported files alone, our kernels for our networks."""
    cases = [
        Case(candidate.name, runtime, precision)
        for runtime in arguments.runtimes
        for precision in arguments.precisions
        if precision == "fp32" or RUNTIMES[runtime] is not None
    ]
    return [case for case in cases if candidate.kind == "ours" or case.runtime != "kernels"]


def measure_batch(
    candidates: Sequence[Candidate], batch: int, arguments: argparse.Namespace, plan: Plan, folder: Path
) -> dict[str, list[dict[str, Any]]]:
    """Measure every case of one batch size in turns.

    Returns:
        A row for each case under ``cases``, what was converted and has no runtime here, and what cannot run and why.
    """
    prepared: dict[Case, Prepared] = {}
    failures = []
    for candidate in candidates:
        preparation = Preparation(candidate, batch, folder, arguments.threads, num_images=arguments.images)
        for case in _cases(candidate, arguments):
            logger.info("%s in %s, %s, batch %d", case.network, case.runtime, case.precision, batch)
            try:
                prepared[case] = preparation.prepare(case.runtime, case.precision)
            except Exception as error:  # each runtime has errors of its own
                failures.append(failure_of(case, batch, error))
    timings = measure({case: each.run for case, each in prepared.items() if each.run is not None}, plan, "cpu")
    rows = []
    for case, timing in timings.items():
        rows.append(
            {
                **vars(case),
                "batch": batch,
                "images_per_s": batch / timing.median,
                "over_eager": _over_eager(case, timings),
                **prepared[case].as_dict(),
                **timing.as_dict(),
            }
        )
    converted = [
        {**vars(case), "batch": batch, "num_bytes": each.num_bytes}
        for case, each in prepared.items()
        if each.run is None
    ]
    return {"cases": rows, "converted": converted, "failures": failures}


def _over_eager(case: Case, timings: dict[Case, Timing]) -> float | None:
    """Return how many times the throughput of PyTorch without kernels a case has; None where that was not measured."""
    eager = timings.get(Case(case.network, "eager", "fp32"))
    return None if eager is None else speedup(timings[case], eager)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure, print, and write the result and its picture.

    Args:
        arguments: From `parse`.

    Returns:
        The content of the result file.
    """
    plan = set_up(arguments)
    machine = describe_machine("cpu") | {"packages": versions()}
    print(summary_line(machine))
    candidates = [_built(name) for name in arguments.networks]
    figures: dict[str, list] = {"cases": [], "converted": [], "failures": []}
    with tempfile.TemporaryDirectory() as folder:
        files = arguments.files or Path(folder)
        files.mkdir(parents=True, exist_ok=True)
        for batch in arguments.batches:
            measured = measure_batch(candidates, batch, arguments, plan, files)
            for kind, rows in measured.items():
                figures[kind] += rows
            print(f"\nBatch {batch}\n")
            header = ("network", "runtime", "precision", "images_per_s", "over_eager", "error")
            cells = [[row[key] for key in header] for row in measured["cases"]]
            print(table(cells, ("network", "runtime", "precision", "images/s", "over eager", "error")))
    result = save_and_draw("runtimes", machine, arguments, plan, figures)
    print(f"\n{tables([result])}")
    return result


def parse(command_line: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the arguments, with what is left to ``--quick`` filled in."""
    parser = new_parser("runtimes", __doc__)
    add_arguments(parser)
    parser.add_argument("--networks", nargs="+", choices=NAMES, metavar="NAME", help=f"of {', '.join(NAMES)}")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16], help="images at a time (default: 1 16)")
    parser.add_argument(
        "--runtimes", nargs="+", choices=(*RUNTIMES, ALL), help=f"default: {' '.join(DEFAULT_RUNTIMES)}"
    )
    parser.add_argument(
        "--precisions", nargs="+", choices=PRECISIONS, default=["fp32", "int8"], help="default: fp32 int8"
    )
    parser.add_argument("--images", type=int, default=16, help="pictures to compare answers on (default: 16)")
    parser.add_argument("--files", type=Path, help="keep exported files in this folder, and take those of earlier runs")
    parser.add_argument("--compile", action="store_true", help="measure torch.compile too")
    arguments = parser.parse_args(command_line)
    if arguments.device != "cpu":
        parser.error("runtimes are compared on a CPU: --device cpu")
    arguments.networks = arguments.networks or list(QUICK_NETWORKS if arguments.quick else NETWORKS)
    arguments.runtimes = arguments.runtimes or list(DEFAULT_RUNTIMES)
    if ALL in arguments.runtimes:
        arguments.runtimes = [name for name in RUNTIMES if name != "compile"]
    if arguments.compile and "compile" not in arguments.runtimes:
        arguments.runtimes.append("compile")
    return arguments


if __name__ == "__main__":
    main(parse, run)
