"""Speed beside other programs that want every core: a share of what is fair.

    python -m benchmarks.busy [--quick] [--variants MobileMamba_T2]

A network infers one image, then 16, and trains, each in a process of its own: alone, and beside as many processes that
burn a core as there are cores. Then half of its speed alone is fair. Each is measured with nothing set in the
environment, as in a program that uses the library, and with OMP_WAIT_POLICY=passive, as run.py sets it.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch

from model import create_model, list_models

from .common import (
    Plan,
    Timing,
    add_arguments,
    describe_machine,
    main,
    result_path,
    save_result,
    set_up,
    summary_line,
    table,
    take_turn,
    warm_up,
)
from .parsers import new_parser
from .train_step import Case as Step
from .train_step import training_step

__all__ = ["Case", "measure_case", "parse", "run"]

FULL = Plan(warmup=2.0, seconds=30.0, runs=200, turns=5)
QUICK = Plan(warmup=0.2, seconds=2.0, runs=10, turns=2)
POLICIES = ("", "passive")
WAIT_POLICY = "OMP_WAIT_POLICY"


@dataclass(frozen=True)
class Case:
    """One line of the result.

    Attributes:
        variant: Of MobileMamba.
        work: "inference" or "training".
        batch: Images at a time.
        wait_policy: OMP_WAIT_POLICY; "" for unset.
        threads: Threads of PyTorch.
    """

    variant: str
    work: str
    batch: int
    wait_policy: str
    threads: int


def _run_of(case: Case) -> Callable[[], Any]:
    if case.work == "training":
        return training_step(Step(case.variant, "ours", "fp32", case.batch, "cpu", case.threads))
    torch.manual_seed(0)
    network = create_model(case.variant).eval().fuse()
    images = torch.randn(case.batch, 3, network.img_size, network.img_size)

    @torch.inference_mode()
    def infer() -> None:
        network(images)

    return infer


def _work(case: Case, plan: Plan, connection: Connection) -> None:
    """Answer every message True with the samples of a turn."""
    torch.set_num_threads(case.threads)
    run = _run_of(case)
    warm_up(run, plan, "cpu")
    connection.send("ready")
    while connection.recv():
        connection.send(take_turn(run, plan, "cpu"))


def _burn() -> None:
    while True:
        pass


@contextmanager
def _processes(count: int, target: Callable[..., None], *arguments: Any) -> Iterator[None]:
    """Keep so many processes running."""
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=target, args=arguments, daemon=True) for _ in range(count)]
    try:
        for process in processes:
            process.start()
        yield
    finally:
        for process in processes:
            process.kill()
            process.join()


@contextmanager
def _environment(wait_policy: str) -> Iterator[None]:
    """Give processes that start within another policy of waiting."""
    before = os.environ.pop(WAIT_POLICY, None)
    if wait_policy:
        os.environ[WAIT_POLICY] = wait_policy
    try:
        yield
    finally:
        os.environ.pop(WAIT_POLICY, None)
        if before is not None:
            os.environ[WAIT_POLICY] = before


def measure_case(case: Case, plan: Plan, num_burners: int) -> tuple[Timing, Timing]:
    """Return its timings alone and beside the burners, which took turns."""
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    alone: list[list[float]] = []
    beside: list[list[float]] = []
    with _environment(case.wait_policy), _processes(1, _work, case, plan, theirs):
        theirs.close()  # so that a process that dies ends recv with an EOFError
        ours.recv()
        for _ in range(plan.turns):
            alone.append(_turn(ours))
            with _processes(num_burners, _burn):
                beside.append(_turn(ours))
    return Timing(alone), Timing(beside)


def _turn(connection: Connection) -> list[float]:
    connection.send(True)
    return connection.recv()


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure, print and save; return the content of the result file."""
    plan = set_up(arguments, full=FULL, quick=QUICK)
    machine = describe_machine("cpu")
    print(summary_line(machine))
    cores = machine["cores"]
    rows = []
    for variant in arguments.variants:
        for work, batch in (("inference", 1), ("inference", 16), ("training", 16)):
            for policy in POLICIES:
                case = Case(variant, work, batch, policy, arguments.threads)
                alone, beside = measure_case(case, plan, cores)
                quiet, busy = (batch / timing.median for timing in (alone, beside))
                fair = quiet * cores / (cores + max(cores, case.threads))
                rows.append({**asdict(case), "quiet_images_per_s": quiet, "busy_images_per_s": busy})
                rows[-1]["share_of_fair"] = busy / fair
    header = (
        "variant",
        "work",
        "batch",
        "OMP_WAIT_POLICY",
        "images/s alone",
        "images/s beside",
        "of what is fair",
    )
    keys = ("quiet_images_per_s", "busy_images_per_s", "share_of_fair")
    cells = [
        (row["variant"], row["work"], row["batch"], row["wait_policy"] or "unset", *(row[key] for key in keys))
        for row in rows
    ]
    print(f"\nBeside {cores} processes that burn a core each\n\n{table(cells, header)}")
    path = result_path(arguments, "busy", machine)
    print(f"\n{save_result(path, 'busy', machine, arguments, plan=vars(plan), cases=rows)}")
    return {"benchmark": "busy", "machine": machine, "cases": rows}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; ``sys.argv`` when ``arguments`` is None."""
    parser = new_parser("busy", __doc__)
    add_arguments(parser)
    parser.add_argument("--variants", nargs="+", default=["MobileMamba_T2"], choices=list_models())
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main(parse, run)
