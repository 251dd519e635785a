"""Training steps of the variants beside the literal network: images/s and peak memory.

    python -m benchmarks.train_step [--quick] [--variants MobileMamba_B1] [--batch 16] [--precisions fp32]

A step is forward, cross-entropy, backward, AdamW, in a process set up as the trainer sets up its own. Every network
lives in a fresh process, for its peak memory to be its own; the two of a pair take turns, the other one waiting
meanwhile.
"""

from __future__ import annotations

import argparse
import multiprocessing
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from model import create_model, list_models
from util.memory import frozen_objects, keep_freed_memory

from .common import (
    Plan,
    Timing,
    add_arguments,
    describe_machine,
    main,
    precision_context,
    save_and_draw,
    set_up,
    speedup,
    summary_line,
    table,
    take_turn,
    warm_up,
)
from .literal import create_literal
from .parsers import new_parser

__all__ = ["Case", "parse", "run"]

KINDS = ("ours", "literal")
QUICK_VARIANTS = ("MobileMamba_T2",)
# Steps take seconds, and the processes of a pair a while to start.
FULL = Plan(warmup=3.0, seconds=15.0, runs=30, turns=5)


@dataclass(frozen=True)
class Case:
    """What one process trains.

    Attributes:
        variant: Name of the variant.
        kind: One of `KINDS`.
        precision: "fp32" or "amp".
        batch: Images a step.
        device: "cpu" or "cuda".
        threads: Threads of PyTorch.
    """

    variant: str
    kind: str
    precision: str
    batch: int
    device: str
    threads: int


def training_step(case: Case) -> Callable[[], None]:
    """Return what runs one step, on the same made-up images each time."""
    torch.manual_seed(0)
    network = (create_literal if case.kind == "literal" else create_model)(case.variant).to(case.device).train()
    if case.kind == "ours":
        network = network.to(memory_format=torch.channels_last)
    is_fused = True if case.device == "cpu" else None  # as `optim.build_optimizer` has it
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, weight_decay=0.05, fused=is_fused)
    images = torch.randn(case.batch, 3, network.img_size, network.img_size, device=case.device)
    targets = torch.randint(network.num_classes, (case.batch,), device=case.device)

    def step() -> None:
        optimizer.zero_grad()
        with precision_context(case.precision, case.device):
            loss = F.cross_entropy(network(images), targets)
        loss.backward()
        optimizer.step()

    return step


def _memory(field: str) -> int:
    """Return a field of this process's memory in bytes: VmHWM, its peak, or VmRSS, what it holds."""
    status = Path("/proc/self/status").read_text()
    match = re.search(rf"^{field}:\s*(\d+) kB$", status, re.MULTILINE)
    assert match
    return int(match[1]) * 1024


def _peak(device: str) -> int:
    return torch.cuda.max_memory_allocated() if device == "cuda" else _memory("VmHWM")


def work(case: Case, plan: Plan, connection: Connection) -> None:
    """Train in this process: a turn for every message True, and at the end the peak memory."""
    torch.set_num_threads(case.threads)
    start = 0 if case.device == "cuda" else _memory("VmRSS")
    if case.device == "cpu":
        keep_freed_memory()
    step = training_step(case)
    warm_up(step, plan, case.device)
    connection.send("ready")
    with frozen_objects():
        while connection.recv():
            connection.send(take_turn(step, plan, case.device))
    peak = _peak(case.device)
    connection.send({"peak_bytes": peak, "above_start_bytes": peak - start})


@contextmanager
def _worker(case: Case, plan: Plan) -> Iterator[Connection]:
    """Start a process for a case, warmed up; stop it at the end."""
    context = multiprocessing.get_context("spawn")
    connection, theirs = context.Pipe()
    process = context.Process(target=work, args=(case, plan, theirs), daemon=True)
    process.start()
    theirs.close()  # so that a process that dies ends recv with an EOFError
    try:
        connection.recv()
        yield connection
        process.join()
    finally:
        process.kill()
        process.join()
        connection.close()


def measure_pair(cases: Sequence[Case], plan: Plan) -> tuple[list[Timing], list[dict[str, int]]]:
    """Let two cases take turns in processes of their own; return their timings and memory."""
    first, second = cases
    with _worker(first, plan) as one, _worker(second, plan) as two:
        turns: list[list[list[float]]] = [[], []]
        for _ in range(plan.turns):
            for connection, samples in zip((one, two), turns, strict=True):
                connection.send(True)
                samples.append(connection.recv())
        memory = []
        for connection in (one, two):
            connection.send(False)
            memory.append(connection.recv())
    return [Timing(samples) for samples in turns], memory


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure, print, and write the result and its picture; return the content of the result file."""
    plan = set_up(arguments, full=FULL)
    machine = describe_machine(arguments.device)
    print(summary_line(machine))
    rows: list[dict[str, Any]] = []
    ratios: list[dict[str, Any]] = []
    for variant in arguments.variants:
        for precision in arguments.precisions:
            setting = (precision, arguments.batch, arguments.device, arguments.threads)
            cases = [Case(variant, kind, *setting) for kind in KINDS]
            timings, memory = measure_pair(cases, plan)
            for case, timing, own in zip(cases, timings, memory, strict=True):
                rows.append({**asdict(case), "images_per_s": case.batch / timing.median, **own, **timing.as_dict()})
            ratios.append({"variant": variant, "precision": precision, "speed": speedup(*timings)})
            ratios[-1] |= {key: memory[0][key] / memory[1][key] for key in memory[0]}
    _print(rows, ratios)
    figures = {"cases": rows, "ratios": ratios}
    return save_and_draw("train_step", machine, arguments, plan, figures)


def _print(rows: Sequence[dict[str, Any]], ratios: Sequence[dict[str, Any]]) -> None:
    print(f"\nTraining steps of {rows[0]['batch']} images\n")
    cells = [
        (
            row["variant"],
            row["kind"],
            row["precision"],
            row["images_per_s"],
            row["peak_bytes"] / 2**20,
            row["above_start_bytes"] / 2**20,
        )
        for row in rows
    ]
    print(table(cells, ("variant", "network", "precision", "images/s", "peak MiB", "above start MiB")))
    print("\nOurs over the literal network\n")
    keys = ("variant", "precision", "speed", "peak_bytes", "above_start_bytes")
    ratio_cells = [tuple(row[key] for key in keys) for row in ratios]
    print(table(ratio_cells, ("variant", "precision", "images/s", "peak memory", "above start")))


def parse(command_line: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the arguments, with what is left to ``--quick`` filled in."""
    parser = new_parser("train_step", __doc__)
    add_arguments(parser)
    parser.add_argument("--variants", nargs="+", choices=list_models(), help="what to train (default: all)")
    parser.add_argument("--batch", type=int, default=16, help="images a step")
    parser.add_argument("--precisions", nargs="+", choices=("fp32", "amp"), default=["fp32"])
    arguments = parser.parse_args(command_line)
    arguments.variants = arguments.variants or list(QUICK_VARIANTS if arguments.quick else list_models())
    return arguments


if __name__ == "__main__":
    main(parse, run)
