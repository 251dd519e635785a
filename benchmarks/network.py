"""Throughput and latency of the variants beside their peers and beside the literal network.

    python -m benchmarks.network [--quick] [--batches 1 16] [--precisions fp32 amp] [--modes eager onnxruntime ...]

A variant, its literal network and its peers take turns in one process, for each batch size. Every network is measured
in both memory layouts; the tables give each in its better one, eager and in its best mode. Exported files have the
layout that their runtime chooses.
"""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
import logging
import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.export.formats import require
from model.lib_mamba import choose, use_backend
from util.memory import keep_freed_memory

from .common import (
    PRECISIONS,
    Plan,
    Timing,
    add_arguments,
    capture,
    describe_machine,
    failure_of,
    main,
    measure,
    precision_context,
    save_and_draw,
    set_up,
    speedup,
    summary_line,
    synchronize,
    table,
)
from .networks import NAMES, Candidate, build, literal_name
from .parsers import new_parser
from .runners import RUNTIMES, Preparation, versions

__all__ = ["Case", "run"]

logger = logging.getLogger(__name__)

# Eager PyTorch with our compiled kernels where they are installed, and without; and what else runs a network.
MODES = ("eager", "plain", "compile", "onnxruntime", "openvino")
EXPORTED = ("onnxruntime", "openvino")
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
QUICK_NETWORKS = (
    "MobileMamba_T2",
    "MobileMamba_B1",
    "MobileMamba_T2 (literal)",
    "MobileMamba_B1 (literal)",
    "efficientvit_m5",
    "mobilenetv4_conv_medium",
)
# Whom a user would take instead; every variant is compared with its own literal network besides.
RIVALS = {
    "MobileMamba_T2": ("efficientvit_m5", "cpubone_t0", "mobilenetv4_conv_small"),
    "MobileMamba_T4": ("shvit_s3", "cpubone_s0", "efficientvim_m2"),
    "MobileMamba_S6": ("shvit_s3", "cpubone_b0_bfrobust", "efficientvim_m4", "iformer_s"),
    "MobileMamba_B1": ("mobilenetv4_conv_medium", "shvit_s4", "repvit_m1_0", "lowformer_b1", "iformer_m"),
    "MobileMamba_B2": ("levit_256", "repvit_m1_5", "fastvit_sa12"),
    "MobileMamba_B4": ("edgenext_base", "cpubone_b3"),
}


@dataclass(frozen=True)
class Case:
    """One way to run one network.

    Attributes:
        network: One of `NAMES`.
        precision: One of `PRECISIONS`.
        layout: One of `LAYOUTS`, or "own" in a runtime that chooses for itself.
        mode: One of `MODES`; "graph" (eager, replayed as a CUDA graph) or "compile+graph".
    """

    network: str
    precision: str
    layout: str
    mode: str


class Measurement:
    """The timings of one batch size, and what follows from them."""

    def __init__(self, batch: int, timings: dict[Case, Timing], candidates: dict[str, Candidate]) -> None:
        self.batch = batch
        self.timings = timings
        self.candidates = candidates

    def best(self, network: str, precision: str, *, mode: str | None = None) -> Case | None:
        """Return a network's fastest case, of one mode or of all; None if none was measured."""
        cases = [
            case
            for case in self.timings
            if (case.network, case.precision) == (network, precision) and mode in (None, case.mode)
        ]
        return min(cases, key=lambda case: self.timings[case].median, default=None)

    def images_per_s(self, case: Case) -> float:
        """Return the throughput at the median time."""
        return self.batch / self.timings[case].median

    def rows(self) -> list[dict[str, Any]]:
        """Return every case for the result file."""
        return [
            {
                **vars(case),
                "kind": self.candidates[case.network].kind,
                "size": self.candidates[case.network].size,
                "parameters": self.candidates[case.network].parameters,
                "batch": self.batch,
                "images_per_s": self.images_per_s(case),
                **timing.as_dict(),
            }
            for case, timing in self.timings.items()
        ]

    def best_rows(self) -> list[dict[str, Any]]:
        """Return each network's best per precision, with its eager figure beside it."""
        rows = []
        for network, precision in dict.fromkeys((case.network, case.precision) for case in self.timings):
            case = self.best(network, precision)
            eager = self.best(network, precision, mode="eager")
            assert case
            assert eager
            rows.append(
                {
                    "network": network,
                    "kind": self.candidates[network].kind,
                    "size": self.candidates[network].size,
                    "batch": self.batch,
                    "precision": precision,
                    "images_per_s": self.images_per_s(case),
                    "latency_s": self.timings[case].median,
                    "layout": case.layout,
                    "mode": case.mode,
                    "eager_images_per_s": self.images_per_s(eager),
                    "eager_layout": eager.layout,
                    "is_disturbed": self.timings[case].is_disturbed,
                }
            )
        return rows

    def ratios(self) -> list[dict[str, Any]]:
        """Return how many times faster each variant is than its literal network, its rivals, and itself in fp32."""
        precisions = list(dict.fromkeys(case.precision for case in self.timings))
        rows = []
        for variant, rivals in RIVALS.items():
            for precision in precisions:
                others = [(name, precision) for name in (literal_name(variant), *rivals)]
                others += [(variant, "fp32")] if precision != "fp32" else []
                rows += [self._ratio((variant, precision), other) for other in others]
        return [row for row in rows if row]

    def _ratio(self, ours: tuple[str, str], other: tuple[str, str]) -> dict[str, Any] | None:
        row: dict[str, Any] = {"network": ours[0], "over": other[0], "batch": self.batch}
        row |= {"precision": ours[1], "over_precision": other[1]}
        for key, mode in (("eager", "eager"), ("best", None)):
            fast, slow = self.best(*ours, mode=mode), self.best(*other, mode=mode)
            if not fast or not slow:
                return None
            row[key] = speedup(self.timings[fast], self.timings[slow])
        return row


def _modes(candidate: Candidate, arguments: argparse.Namespace) -> list[str]:
    """Return the modes to measure; unrolling the literal network's loops for a compiler is nothing anyone would do."""
    if candidate.kind == "literal":
        modes = ["eager"]
    else:
        modes = [mode for mode in arguments.modes if mode != "plain" or candidate.kind == "ours"]
    if arguments.cuda_graph:
        graphs = {"eager": "graph", "compile": "compile+graph"}
        modes += [graphs[mode] for mode in modes if mode in graphs]
    return modes


def _cases(candidate: Candidate, arguments: argparse.Namespace) -> list[Case]:
    layouts = ["nchw"] if candidate.kind == "literal" else list(LAYOUTS)
    return [
        Case(candidate.name, precision, layout, mode)
        for precision in arguments.precisions
        for mode in _modes(candidate, arguments)
        if mode not in EXPORTED or precision == "fp32"
        for layout in (["own"] if mode in EXPORTED else layouts)
    ]


def _prepare(
    case: Case, candidate: Candidate, batch: int, device: str, exported: Callable[[], Preparation]
) -> Callable[[], Any]:
    """Return what runs the case once, weights and input in place; ``exported`` prepares files of the network."""
    if case.mode in EXPORTED:
        return exported().prepare(case.mode).run
    network = copy.deepcopy(candidate.network).to(device=device, memory_format=LAYOUTS[case.layout])
    image = torch.randn(batch, 3, candidate.size, candidate.size, device=device)
    if case.precision == "bf16":
        network, image = network.bfloat16(), image.bfloat16()
    image = image.contiguous(memory_format=LAYOUTS[case.layout])
    run_network: Any = torch.compile(network, dynamic=False) if "compile" in case.mode else network

    def run() -> Tensor:
        backend = use_backend("reference") if case.mode == "plain" else nullcontext()
        with backend, torch.inference_mode(), precision_context(case.precision, device):
            return run_network(image)

    run()  # compiles; what fails, fails here
    return capture(run) if "graph" in case.mode else run


def _scan_share(run: Callable[[], Any], device: str) -> float | None:
    """Return the part of a network's time that the scan's operator takes; None where the profiler does not see it."""
    is_cuda = device == "cuda"
    with torch.autograd.profiler.profile(use_device="cuda" if is_cuda else None, use_kineto=is_cuda) as profile:
        for _ in range(3):
            run()
        synchronize(device)
    time = f"{'device' if is_cuda else 'cpu'}_time_total"
    events = profile.key_averages()
    own = f"self_{time}"
    total = sum(getattr(event, own) for event in events)
    scan = sum(getattr(event, time) for event in events if event.key == "mobilemamba::gated_scan")
    return scan / total if total and scan else None


def measure_batch(
    candidates: Sequence[Candidate], batch: int, arguments: argparse.Namespace, plan: Plan, folder: Path
) -> tuple[Measurement, list[dict[str, Any]], list[dict[str, Any]]]:
    """Measure every case of one batch size in turns.

    Returns:
        The timings, the cases that cannot run with the reason, and the scan's share of each variant's time.
    """
    torch.compiler.reset()
    # All variants share their code, and so the number of compiled versions that it may have: never fall back unseen.
    torch._dynamo.config.recompile_limit = 256
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    runs: dict[Case, Callable[[], Any]] = {}
    failures = []
    shares = []
    for candidate in candidates:
        # Its answers are PyTorch's, which all runtimes share; where nothing is exported, nobody needs them.
        exported = functools.cache(functools.partial(Preparation, candidate, batch, folder, arguments.threads))
        for case in _cases(candidate, arguments):
            try:
                runs[case] = _prepare(case, candidate, batch, arguments.device, exported)
            except Exception as error:  # each runtime has errors of its own
                failures.append(failure_of(case, batch, error))
                continue
            if candidate.kind == "ours" and (case.layout, case.mode) == ("channels_last", "eager"):
                share = _scan_share(runs[case], arguments.device)
                if share is not None:
                    own = {"network": case.network, "precision": case.precision, "batch": batch}
                    shares.append({**own, "share": share})
    timings = measure(runs, plan, arguments.device)
    return Measurement(batch, timings, {candidate.name: candidate for candidate in candidates}), failures, shares


def groups(candidates: Sequence[Candidate]) -> list[list[Candidate]]:
    """Return each variant with its literal network and its rivals; the last group has what belongs to no variant.

    What is compared takes turns. Without groups, 31 networks in three modes took 22 GiB of memory at batch 16.
    """
    by_name = {candidate.name: candidate for candidate in candidates}
    names = [[variant, literal_name(variant), *rivals] for variant, rivals in RIVALS.items() if variant in by_name]
    rest = [name for name in by_name if name not in itertools.chain(*names)]
    return [[by_name[name] for name in group if name in by_name] for group in (*names, rest) if group]


def _print(measurement: Measurement, shares: list[dict[str, Any]]) -> None:
    print(f"\nBatch {measurement.batch}: each network in its better layout, eager and in its best mode\n")
    rows = [
        (
            row["network"],
            row["size"],
            row["precision"],
            row["eager_images_per_s"],
            row["eager_layout"],
            row["images_per_s"],
            f"{row['mode']}, {row['layout']}",
            row["latency_s"] * 1e3,
            "disturbed" if row["is_disturbed"] else "",
        )
        for row in measurement.best_rows()
    ]
    header = ("network", "px", "precision", "eager images/s", "layout", "best images/s", "mode", "ms a batch", "")
    print(table(rows, header))
    rows = [
        (row["network"], row["precision"], f"{row['over']}, {row['over_precision']}", row["eager"], row["best"])
        for row in measurement.ratios()
    ]
    if rows:
        print("\nTimes the throughput of\n")
        print(table(rows, ("network", "precision", "over", "eager", "best")))
    rows = [(row["network"], row["precision"], 100 * row["share"]) for row in shares]
    if rows:
        print("\nThe scan's share of the eager network's time\n")
        print(table(rows, ("network", "precision", "%")))


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure, print, and write the result and its picture.

    Args:
        arguments: From `parse`.

    Returns:
        The content of the result file.

    Raises:
        RuntimeError: If freed memory is to be kept and cannot be.
    """
    plan = set_up(arguments)
    if arguments.keep_memory and not keep_freed_memory():
        raise RuntimeError("--keep-memory needs glibc, which alone can be told to: leave it out")
    machine = describe_machine(arguments.device) | {"packages": versions()}
    print(summary_line(machine))
    candidates = [build(name) for name in arguments.networks]
    figures: dict[str, list] = {"best": [], "ratios": [], "scan_share": [], "cases": [], "failures": []}
    with tempfile.TemporaryDirectory() as folder:
        for batch, group in itertools.product(arguments.batches, groups(candidates)):
            measurement, failures, shares = measure_batch(group, batch, arguments, plan, Path(folder))
            _print(measurement, shares)
            figures["best"] += measurement.best_rows()
            figures["ratios"] += measurement.ratios()
            figures["scan_share"] += shares
            figures["cases"] += measurement.rows()
            figures["failures"] += failures
    return save_and_draw("network", machine, arguments, plan, figures)


def _default_modes(arguments: argparse.Namespace) -> list[str]:
    if arguments.quick or arguments.device != "cpu":
        return ["eager"]
    missing = []
    for mode in EXPORTED:
        try:
            require(RUNTIMES[mode])
        except ModuleNotFoundError as error:
            logger.warning("%s is not measured: %s", mode, error)
            missing.append(mode)
    if choose(arguments.device).name == "reference":
        missing.append("plain")  # is what eager is
    return [mode for mode in MODES if mode not in missing]


def parse(command_line: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the arguments, with what is left to the device and to ``--quick`` filled in."""
    parser = new_parser("network", __doc__)
    add_arguments(parser)
    parser.add_argument("--networks", nargs="+", choices=NAMES, metavar="NAME", help=f"of {', '.join(NAMES)}")
    parser.add_argument("--batches", nargs="+", type=int, help="images at a time (CPU: 1 16; GPU: 1 16 256)")
    parser.add_argument(
        "--precisions", nargs="+", choices=PRECISIONS, help="amp: bfloat16 autocast (default: fp32 amp)"
    )
    parser.add_argument(
        "--modes", nargs="+", choices=MODES, help="eager, and in a full run on a CPU all that are installed"
    )
    parser.add_argument("--cuda-graph", action="store_true", help="measure CUDA graphs too")
    parser.add_argument("--keep-memory", action="store_true", help="keep freed memory in the process, as training does")
    arguments = parser.parse_args(command_line)
    if arguments.cuda_graph and arguments.device != "cuda":
        parser.error("--cuda-graph needs --device cuda")
    arguments.networks = arguments.networks or list(QUICK_NETWORKS if arguments.quick else NAMES)
    if arguments.device != "cpu" and arguments.modes and set(arguments.modes) & set(EXPORTED):
        parser.error(f"{', '.join(EXPORTED)} are measured on a CPU: leave them out of --modes")
    arguments.modes = list(dict.fromkeys(["eager", *(arguments.modes or _default_modes(arguments))]))
    arguments.batches = arguments.batches or ([1, 16] if arguments.device == "cpu" else [1, 16, 256])
    arguments.precisions = arguments.precisions or (["fp32"] if arguments.quick else ["fp32", "amp"])
    return arguments


if __name__ == "__main__":
    main(parse, run)
