"""Everything to know of MobileMamba on a GPU, checked and timed by one command.

    python -m benchmarks.gpu_report [--sections core throughput] [--out folder]

Checks: every backend of the scan against float64, repeatable gradients, opcheck, torch.compile, CUDA graphs, the
released network's logits. Times: the scan beside its memory floor, throughput and latency of the networks beside their
aims, training steps. And a look at float16 training and at NCCL. A section that fails is noted, and the others go on;
the result file is written after each. Without a GPU, `--device cpu --quick` runs the same code in small.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import logging
import math
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from model import create_model, list_models
from model.lib_mamba import backends, set_backend, use_backend

from . import gpu_checks, network, networks, scan, train_step
from .common import (
    Plan,
    add_arguments,
    describe_machine,
    measure,
    result_path,
    save_result,
    set_up,
    summary_line,
    table,
)
from .gpu_checks import EPS, REVERSE, Row

__all__ = ["SECTIONS", "main", "parse", "run"]

T2, B1 = "MobileMamba_T2", "MobileMamba_B1"
# Aims for one NVIDIA H200: seconds an image in bf16 at batch 256, and alone; times the memory floor of the scan.
AIMS = {T2: 1 / 60_000, "MobileMamba_S6": 1 / 35_000, B1: 1 / 22_000, "MobileMamba_B4": 1 / 6_000}
LATENCY_AIMS = {T2: 0.5e-3}
TIMES_THE_FLOOR = {"forward": 2.0, "backward": 3.0}
PLAN = Plan(warmup=0.1, seconds=0.5, runs=30, turns=5)
QUICK_PLAN = Plan(warmup=0.0, seconds=0.1, runs=2, turns=1)


@dataclass(frozen=True)
class Scale:
    """How much of everything.

    Attributes:
        variants: Whose scans and networks are timed.
        few_variants: Whose latency and training steps are timed.
        lengths: At which L the scan is checked.
        repeated_lengths: At which it has to give the same again.
        batch: Images at a time, where throughput is measured.
        train_batch: Images of a training step.
        modes: Ways to run a network, as in `network.Case`, for throughput.
        latency_modes: The same for single images.
        parity_cases: Of the parity kit.
        asked: Backends of the scan to look at.
        backends: Those of them that can run and pass their trial, the fastest first.
    """

    variants: Sequence[str]
    few_variants: Sequence[str]
    lengths: Sequence[int]
    repeated_lengths: Sequence[int]
    batch: int
    train_batch: int
    modes: Sequence[str]
    latency_modes: Sequence[str]
    parity_cases: Sequence[str] = gpu_checks.PARITY_CASES
    asked: Sequence[str] = backends.NAMES
    backends: Sequence[str] = ()


FULL = Scale(
    variants=list_models(),
    few_variants=(T2, B1),
    lengths=(1, 3, 9, 16, 36, 49, 64, 144, 196, 256, 576, 1024, 4000),
    repeated_lengths=(9, 49, 144, 300),
    batch=256,
    train_batch=128,
    modes=("graph", "compile"),
    latency_modes=("graph", "compile+graph"),
)
QUICK = Scale(
    variants=(T2,),
    few_variants=(T2,),
    lengths=(1, 9, 49),
    repeated_lengths=(49,),
    batch=2,
    train_batch=2,
    modes=("eager",),
    latency_modes=("eager",),
    parity_cases=gpu_checks.PARITY_CASES[:1],
)


def _precision(device: str) -> str:
    """Return what is timed: bf16, and on a CPU, which may have no arithmetic for it, float32."""
    return "bf16" if device == "cuda" else "fp32"


def _verdict_on(value: float, aim: float | None, device: str) -> bool | None:
    """Return whether a value is no more than its aim; the aims are for a GPU."""
    return value <= aim if device == "cuda" and aim is not None else None


def core(device: str, scale: Scale, plan: Plan) -> list[Row]:
    """Time all scans of a batch, per variant, beside a multiplication that reads and writes as much."""
    counts = {variant: scan.calls_of(variant) for variant in scale.variants}
    names = ["floor", *scale.backends]
    seconds: dict[tuple[str, str, scan.Call], float] = {}
    for call, direction in itertools.product(
        dict.fromkeys(call for calls in counts.values() for call in calls), scan.FLOOR_TENSORS
    ):
        sets = _input_sets(call, scale.batch, device)
        runs = {name: _core_run(name, direction, sets, device) for name in names}
        for name, timing in measure(runs, plan, device).items():
            seconds[name, direction, call] = timing.median / len(sets)
        # Backward has to move more tensors than the three of a multiplication.
        seconds["floor", direction, call] *= scan.FLOOR_TENSORS[direction] / scan.FLOOR_TENSORS["forward"]
    rows = []
    for variant, direction, name in itertools.product(counts, scan.FLOOR_TENSORS, names):
        total, floor = (
            sum(count * seconds[which, direction, call] for call, count in counts[variant].items())
            for which in (name, "floor")
        )
        ratio = total / floor
        passed = _verdict_on(ratio, TIMES_THE_FLOOR[direction] if name == "cuda" else None, device)
        row = {"variant": variant, "pass": direction, "what": name, "µs": total * 1e6, "times the floor": ratio}
        rows.append({**row, "passed": passed})
    return rows


def _input_sets(call: scan.Call, batch: int, device: str) -> list[list[Tensor]]:
    """Return inputs of a call, several times over, so that no run finds its own in the GPU's cache."""
    tensors = scan.core_arguments(call, batch, scan.DTYPES[_precision(device)], device)
    if device != "cuda":
        return [tensors]
    x, z, *others = tensors
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    number = min(16, 1 + math.ceil(2 * cache / (3 * x.numel() * x.element_size())))
    # z stays part of a wider tensor.
    return [[x.clone(), torch.cat([z, z], -1)[..., call.channels :], *others] for _ in range(number)]


def _core_run(name: str, direction: str, sets: list[list[Tensor]], device: str) -> Callable[[], Any]:
    """Return what runs one pass over every set of inputs; on a GPU as a graph, which leaves out Python's share."""
    forward, backward = torch.ops.mobilemamba.gated_scan, torch.ops.mobilemamba.gated_scan_backward
    others = [torch.randn_like(own[0]) for own in sets]  # where the floor writes, and the gradients of y
    pairs = list(zip(sets, others, strict=True))
    if name == "floor":
        calls = [functools.partial(torch.mul, own[0], own[1], out=y) for own, y in pairs]
    elif direction == "forward":
        calls = [functools.partial(forward, *own, EPS, REVERSE) for own in sets]
    else:
        calls = [functools.partial(backward, grad, *own, EPS, REVERSE) for own, grad in pairs]

    def run() -> None:
        with torch.inference_mode(), use_backend(None if name == "floor" else name):
            for call in calls:
                call()

    return network._capture(run) if device == "cuda" else run


def throughput(device: str, scale: Scale, plan: Plan) -> list[Row]:
    """Time the folded networks in bf16, channels-last."""
    return _time_networks(scale.variants, scale.modes, scale.batch, device, plan, AIMS)


def latency(device: str, scale: Scale, plan: Plan) -> list[Row]:
    """Time the same with one image."""
    return _time_networks(scale.few_variants, scale.latency_modes, 1, device, plan, LATENCY_AIMS)


def _time_networks(
    variants: Sequence[str],
    modes: Sequence[str],
    batch: int,
    device: str,
    plan: Plan,
    aims: Mapping[str, float],
) -> list[Row]:
    """Time every variant in every mode; a variant passes in the modes that take no longer than its aim."""
    rows = []
    for variant in variants:
        aim = aims.get(variant)
        for mode, seconds in _network_seconds(variant, modes, batch, device, plan).items():
            row = {"variant": variant, "mode": mode, "ms": seconds * 1e3, "images/s": batch / seconds}
            row["aim, ms"] = None if aim is None else aim * batch * 1e3
            rows.append({**row, "passed": _verdict_on(seconds / batch, aim, device)})
    return rows


def _network_seconds(variant: str, modes: Sequence[str], batch: int, device: str, plan: Plan) -> dict[str, float]:
    """Return the median time of a network in each mode that works; at least one has to."""
    torch.compiler.reset()
    candidate = networks.build(variant)
    runs, failures = {}, []
    for mode in modes:
        try:
            runs[mode] = network._prepare(
                network.Case(variant, _precision(device), "channels_last", mode), candidate, batch, device
            )
        except Exception as error:
            failures.append(f"{variant}, {mode}: {error}")
            print(failures[-1])
    if not runs:
        raise RuntimeError("; ".join(failures))
    return {mode: timing.median for mode, timing in measure(runs, plan, device).items()}


def training(device: str, scale: Scale, plan: Plan) -> list[Row]:
    """Time training steps on each backend, on a GPU in bf16 autocast and with the peak of memory."""
    rows = []
    for variant, name in itertools.product(scale.few_variants, scale.backends):
        precision = "amp" if device == "cuda" else "fp32"
        case = train_step.Case(variant, "ours", precision, scale.train_batch, device, torch.get_num_threads())
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        with use_backend(name):
            (timing,) = measure({name: train_step.training_step(case)}, plan, device).values()
        peak = torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else None
        row = {"variant": variant, "backend": name, "batch": scale.train_batch}
        rows.append({**row, "images/s": scale.train_batch / timing.median, "peak MiB": peak, "passed": None})
    return rows


def float16(device: str, scale: Scale, plan: Plan) -> list[Row]:
    """Train a little in float16 (on a CPU, float32) with a gradient scaler: the loss has to fall, and stay finite."""
    rows = []
    for name in scale.backends:
        with use_backend(name):
            losses, factor = _train_in_float16(device)
        is_well = all(map(math.isfinite, losses)) and losses[-1] < losses[0] and factor >= 1
        rows.append({"backend": name, "first": losses[0], "last": losses[-1], "scale": factor, "passed": is_well})
    return rows


def _train_in_float16(device: str) -> tuple[list[float], float]:
    torch.manual_seed(0)
    model = create_model(T2, num_classes=4, drop_path=0.0).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler(device)
    images = torch.randn(2, 3, 64, 64, device=device)
    targets = torch.arange(2, device=device)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        with torch.autocast(device, dtype=torch.float16, enabled=device == "cuda"):
            loss = F.cross_entropy(model(images), targets)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    return losses, scaler.get_scale()


def process_group(device: str, scale: Scale, plan: Plan) -> list[Row]:
    """Take a step with DistributedDataParallel in a group of one."""
    backend = "nccl" if device == "cuda" else "gloo"
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group(backend, init_method=f"file://{folder}/group", rank=0, world_size=1)
        try:
            model = create_model(T2, num_classes=4).to(device).train()
            parallel = DistributedDataParallel(
                torch.nn.SyncBatchNorm.convert_sync_batchnorm(model) if device == "cuda" else model
            )
            parallel(torch.randn(2, 3, 64, 64, device=device)).square().mean().backward()
            total = torch.ones(3, device=device)
            dist.all_reduce(total)
            gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
            is_well = total.tolist() == [1.0] * 3 and all(gradient.isfinite().all().item() for gradient in gradients)
        finally:
            dist.destroy_process_group()
    return [{"group": backend, "gradients": len(gradients), "passed": is_well}]


def check(function: Callable[..., list[Row]], *fields: str) -> Callable[[str, Scale, Plan], list[Row]]:
    """Return a check of `gpu_checks` as a section, given these fields of the scale."""
    return lambda device, scale, plan: function(device, *(getattr(scale, field) for field in fields))


SECTIONS: dict[str, Callable[[str, Scale, Plan], list[Row]]] = {
    "backends": check(gpu_checks.backends_found, "asked"),
    "exactness": check(gpu_checks.exactness, "backends", "lengths"),
    "repeatability": check(gpu_checks.repeatability, "backends", "repeated_lengths"),
    "operators": check(gpu_checks.operators, "backends"),
    "parity": check(gpu_checks.parity, "backends", "parity_cases"),
    "core": core,
    "throughput": throughput,
    "latency": latency,
    "training": training,
    "float16": float16,
    "process_group": process_group,
}


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run the sections, print their tables, and keep the result file up to date; return what it holds."""
    plan = set_up(arguments, full=PLAN, quick=QUICK_PLAN)
    asked = arguments.backends or backends.NAMES
    scale = replace(QUICK if arguments.quick else FULL, asked=asked, backends=_usable(asked, arguments.device))
    set_backend(scale.backends[0])
    machine = describe_machine(arguments.device)
    print(summary_line(machine))
    path = result_path(arguments, "gpu_report", machine)
    sections: dict[str, dict[str, Any]] = {}
    for name in arguments.sections:
        sections[name] = _run_section(name, arguments.device, scale, plan)
        saved = save_result(path, "gpu_report", machine, arguments, plan=vars(plan), sections=sections)
    rows = [_summary(name, section) for name, section in sections.items()]
    print("\nIn short\n")
    print(table(rows, ("section", "seconds", "passed", "failed", "failure")))
    print(f"\n{saved}")
    return {"benchmark": "gpu_report", "machine": machine, "sections": sections}


def _usable(names: Sequence[str], device: str) -> list[str]:
    """Return the backends that run on the device; at least one has to."""
    usable = []
    for name in names:
        if backends.availability(name)[0] and backends.serves(name, device):
            with use_backend(name):
                try:
                    backends.choose(device)
                except RuntimeError as error:
                    print(error)
                    continue
            usable.append(name)
    if not usable:
        raise SystemExit(f"none of {', '.join(names)} can run the scan on {device}")
    return usable


def _run_section(name: str, device: str, scale: Scale, plan: Plan) -> dict[str, Any]:
    """Run one section and print its table; what goes wrong is kept beside the rows."""
    print(f"\n{name}\n", flush=True)
    start = time.perf_counter()
    rows: list[Row] = []
    failure = ""
    try:
        rows = SECTIONS[name](device, scale, plan)
        print(table([[_verdict(value) for value in row.values()] for row in rows], list(rows[0])), flush=True)
    except Exception as error:
        failure = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        traceback.print_exc()
    return {"seconds": time.perf_counter() - start, "rows": rows, "failure": failure}


def _verdict(value: Any) -> Any:
    """Return a cell of a table: words for what has passed and what has not."""
    return {True: "yes", False: "NO"}[value] if isinstance(value, bool) else value


def _summary(name: str, section: Mapping[str, Any]) -> tuple[Any, ...]:
    verdicts = [row["passed"] for row in section["rows"]]
    return name, section["seconds"], verdicts.count(True), verdicts.count(False), section["failure"]


def parse(command_line: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser)
    parser.add_argument(
        "--backends",
        nargs="+",
        choices=backends.NAMES,
        help="of the scan, to look at; the first one runs the networks (default: all that can run, the fastest first)",
    )
    parser.add_argument("--sections", nargs="+", choices=list(SECTIONS), default=list(SECTIONS), help="what to do")
    arguments = parser.parse_args(command_line)
    if arguments.device == "cpu" and not arguments.quick:
        parser.error("no GPU here: --device cpu --quick runs the same code in small")
    return arguments


def main(command_line: Sequence[str] | None = None) -> int:
    """Run from the command line; return 1 if a section failed or something in it did not pass."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    sections = run(parse(command_line))["sections"].values()
    is_well = all(
        not section["failure"] and all(row["passed"] is not False for row in section["rows"]) for section in sections
    )
    return 0 if is_well else 1


if __name__ == "__main__":
    raise SystemExit(main())
