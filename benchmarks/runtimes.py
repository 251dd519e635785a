"""The variants and other networks, each in every runtime, in float32 and 8 bits.

    python -m benchmarks.runtimes [--quick] [--batches 1 16] [--networks NAME ...] [--compile]

All cases of a batch size take turns in one process. A runtime or precision that cannot run a network is listed with the
reason.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .common import (
    Plan,
    Timing,
    add_arguments,
    describe_machine,
    measure,
    save_and_draw,
    set_up,
    speedup,
    summary_line,
    table,
)
from .networks import NAMES, Candidate, build
from .runners import PRECISIONS, RUNTIMES, Preparation, versions

__all__ = ["Case", "main", "parse", "run"]

logger = logging.getLogger(__name__)

PEERS = ("efficientvit_m5", "mobilenetv4_conv_medium", "repvit_m1_0")
NETWORKS = (*(name for name in NAMES if name.startswith("MobileMamba") and "literal" not in name), *PEERS)
QUICK_NETWORKS = ("MobileMamba_T2", "mobilenetv4_conv_medium")


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


def _cases(candidate: Candidate, arguments: argparse.Namespace) -> list[Case]:
    """Return the cases that make sense: 8 bits in exported files alone, our kernels for our networks."""
    cases = [
        Case(candidate.name, runtime, precision)
        for runtime in arguments.runtimes
        for precision in arguments.precisions
        if precision == "fp32" or RUNTIMES[runtime]
    ]
    return [case for case in cases if candidate.kind == "ours" or case.runtime != "kernels"]


def measure_batch(
    candidates: Sequence[Candidate], batch: int, arguments: argparse.Namespace, plan: Plan, folder: Path
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Measure every case of one batch size in turns.

    Returns:
        A row for each case, and the cases that cannot run with the reason.
    """
    runs, errors, failures = {}, {}, []
    for candidate in candidates:
        preparation = Preparation(candidate, batch, folder, arguments.threads)
        for case in _cases(candidate, arguments):
            logger.info("%s in %s, %s, batch %d", case.network, case.runtime, case.precision, batch)
            try:
                runs[case], errors[case] = preparation.prepare(case.runtime, case.precision)
            except Exception as error:  # each runtime has errors of its own
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                logger.warning("%s, batch %d does not run: %s", case, batch, reason)
                failures.append({**vars(case), "batch": batch, "reason": reason})
    timings = measure(runs, plan, "cpu")
    rows = []
    for case, timing in timings.items():
        rows.append(
            {
                **vars(case),
                "batch": batch,
                "images_per_s": batch / timing.median,
                "over_eager": _over_eager(case, timings),
                "error": errors[case],
                **timing.as_dict(),
            }
        )
    return rows, failures


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
    candidates = [build(name) for name in arguments.networks]
    figures: dict[str, list] = {"cases": [], "failures": []}
    with tempfile.TemporaryDirectory() as folder:
        files = arguments.files or Path(folder)
        files.mkdir(parents=True, exist_ok=True)
        for batch in arguments.batches:
            rows, failures = measure_batch(candidates, batch, arguments, plan, files)
            figures["cases"] += rows
            figures["failures"] += failures
            print(f"\nBatch {batch}\n")
            header = ("network", "runtime", "precision", "images_per_s", "over_eager", "error")
            cells = [[row[key] for key in header] for row in rows]
            print(table(cells, ("network", "runtime", "precision", "images/s", "over eager", "error")))
    return save_and_draw("runtimes", machine, arguments, plan, figures)


def parse(command_line: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the arguments, with what is left to ``--quick`` filled in."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.runtimes", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    parser.add_argument("--networks", nargs="+", choices=NAMES, metavar="NAME", help=f"of {', '.join(NAMES)}")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16], help="images at a time (default: 1 16)")
    parser.add_argument("--runtimes", nargs="+", choices=RUNTIMES, help="default: all but compile")
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS), help="default: both")
    parser.add_argument("--files", type=Path, help="keep exported files in this folder, and take those of earlier runs")
    parser.add_argument("--compile", action="store_true", help="measure torch.compile too")
    arguments = parser.parse_args(command_line)
    if arguments.device != "cpu":
        parser.error("runtimes are compared on a CPU: --device cpu")
    arguments.networks = arguments.networks or list(QUICK_NETWORKS if arguments.quick else NETWORKS)
    arguments.runtimes = arguments.runtimes or [name for name in RUNTIMES if name != "compile"]
    if arguments.compile and "compile" not in arguments.runtimes:
        arguments.runtimes.append("compile")
    return arguments


def main(command_line: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    run(parse(command_line))


if __name__ == "__main__":
    main()
