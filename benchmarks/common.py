"""Shared by the benchmarks: interleaved timing, the machine's description, tables, result files.

Times are in seconds, sizes in bytes, throughputs in images/s.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import logging
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeVar

import timm
import torch

from model.command import exit_code
from model.lib_mamba import choose
from util.cores import count_cores, describe_threads, fitting_threads
from util.logging import markdown_table

__all__ = [
    "FULL",
    "PRECISIONS",
    "QUICK",
    "Plan",
    "Timing",
    "add_arguments",
    "capture",
    "describe_machine",
    "failure_of",
    "main",
    "measure",
    "precision_context",
    "result_path",
    "save_and_draw",
    "save_result",
    "set_up",
    "speedup",
    "summary_line",
    "synchronize",
    "table",
    "take_turn",
    "warm_up",
]

logger = logging.getLogger(__name__)

RESULTS = Path(__file__).resolve().parent / "results"
REPOSITORY = Path(__file__).resolve().parent.parent
# fp32; weights in fp32 under bfloat16 autocast; weights and input in bfloat16.
PRECISIONS = ("fp32", "amp", "bf16")
_CPU_FEATURES = ("avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "sve", "bf16")

DISTURBED = 0.1  # of all cores

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How long to measure. A case runs ``seconds`` or ``runs`` times, whichever is first, spread over ``turns``.

    Attributes:
        warmup: Seconds that every case runs before the first turn.
        seconds: Seconds measured per case.
        runs: Runs measured per case.
        turns: How often the cases take turns: A B A B ... Every turn has one run at least.
        sample: Seconds that one timed sample lasts at least; shorter calls are repeated within it.
    """

    warmup: float
    seconds: float
    runs: int
    turns: int
    sample: float = 0.0


FULL = Plan(warmup=3.0, seconds=10.0, runs=50, turns=10)
QUICK = Plan(warmup=0.2, seconds=0.6, runs=9, turns=3)


@dataclass(frozen=True)
class Timing:
    """Seconds per call of one case, one list a turn.

    Attributes:
        turns: The samples of each turn.
        foreign_load: The share of the machine's cores that other processes took during each turn, where it is known.
    """

    turns: list[list[float]]
    foreign_load: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """The median of all samples."""
        return statistics.median(self._samples)

    @property
    def quartiles(self) -> tuple[float, float]:
        """The first and third quartile of all samples."""
        if len(self._samples) == 1:
            return self._samples[0], self._samples[0]
        first, _, third = statistics.quantiles(self._samples, method="inclusive")
        return first, third

    @property
    def mean_foreign_load(self) -> float | None:
        """The mean of `foreign_load`; None where it is not known."""
        return round(statistics.mean(self.foreign_load), 3) if self.foreign_load else None

    @property
    def is_disturbed(self) -> bool:
        """Whether others took more of the machine than what always runs beside a measurement."""
        return (self.mean_foreign_load or 0.0) > DISTURBED

    @property
    def _samples(self) -> list[float]:
        return [sample for turn in self.turns for sample in turn]

    def as_dict(self) -> dict[str, Any]:
        """Return what a result file keeps of it."""
        first, third = self.quartiles
        return {
            "median_s": self.median,
            "first_quartile_s": first,
            "third_quartile_s": third,
            "samples": len(self._samples),
            "foreign_load": self.mean_foreign_load,
            "is_disturbed": self.is_disturbed,
        }


def speedup(fast: Timing, slow: Timing) -> float:
    """Return how many times faster the first case is: the median over the turns of the ratio within a turn.

    What slows the machine down for a while hits both cases of a turn, and so leaves the ratio alone.
    """
    pairs = zip(fast.turns, slow.turns, strict=True)
    return statistics.median(statistics.median(b) / statistics.median(a) for a, b in pairs)


def synchronize(device: str) -> None:
    """Wait until the device has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def _sample(run: Callable[[], Any], device: str, repeats: int) -> float:
    """Return the seconds of one call, averaged over ``repeats`` calls in a row; events of the device on a GPU."""
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for _ in range(repeats):
            run()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3 / repeats
    begin = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - begin) / repeats


def take_turn(run: Callable[[], Any], plan: Plan, device: str, *, repeats: int = 1) -> list[float]:
    """Return the samples of one turn: its share of the plan's seconds or runs, one at least."""
    num_samples = max(1, -(-plan.runs // plan.turns))
    deadline = time.perf_counter() + plan.seconds / plan.turns
    samples = [_sample(run, device, repeats)]
    while len(samples) < num_samples and time.perf_counter() < deadline:
        samples.append(_sample(run, device, repeats))
    return samples


def warm_up(run: Callable[[], Any], plan: Plan, device: str) -> int:
    """Run for the plan's warm-up, twice at least; return how many calls make one sample long enough."""
    deadline = time.perf_counter() + plan.warmup
    run()
    duration = _sample(run, device, 1)
    while time.perf_counter() < deadline:
        duration = min(duration, _sample(run, device, 1))
    return max(1, min(1000, round(plan.sample / duration)))


def measure(cases: Mapping[Key, Callable[[], Any]], plan: Plan, device: str) -> dict[Key, Timing]:
    """Time the cases in turns, in one process, after warming all of them up.

    Args:
        cases: What to run, without arguments, by any key.
        plan: How long.
        device: "cpu" or "cuda".
    """
    repeats = {key: warm_up(run, plan, device) for key, run in cases.items()}
    timings = {key: Timing([]) for key in cases}
    gc.collect()
    gc.disable()
    try:
        for _ in range(plan.turns):
            for key, run in cases.items():
                before = _cpu_seconds()
                timings[key].turns.append(take_turn(run, plan, device, repeats=repeats[key]))
                if before and (after := _cpu_seconds()):
                    timings[key].foreign_load.append(_foreign_load(before, after))
    finally:
        gc.enable()
    return timings


class _CpuSeconds(NamedTuple):
    """Seconds of all cores so far: of this process, of all processes, and in all."""

    own: float
    busy: float
    total: float


def _cpu_seconds() -> _CpuSeconds | None:
    """Return the counters; None on systems other than Linux."""
    path = Path("/proc/stat")
    if not path.is_file():
        return None
    user, nice, system, idle, wait, *rest = (int(value) for value in path.read_text().split("\n", 1)[0].split()[1:9])
    busy, ticks = user + nice + system + sum(rest), os.sysconf("SC_CLK_TCK")
    return _CpuSeconds(time.process_time(), busy / ticks, (busy + idle + wait) / ticks)


def _foreign_load(before: _CpuSeconds, after: _CpuSeconds) -> float:
    """Return the share of all cores that other processes took between two looks at the counters, from 0 to 1."""
    total = after.total - before.total
    foreign = (after.busy - before.busy) - (after.own - before.own)
    return min(1.0, max(0.0, foreign / total)) if total > 0 else 0.0


def capture(run: Callable[[], Any], *, stream: torch.cuda.Stream | None = None) -> Callable[[], Any]:
    """Return what replays a call as a CUDA graph.

    Args:
        run: Reads and writes the same memory each time.
        stream: Where it is run and captured. Backward passes run on the stream of their forward passes: give that one.
    """
    stream = torch.cuda.Stream() if stream is None else stream
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        output = run()

    def replay() -> Any:
        graph.replay()
        return output

    return replay


def precision_context(precision: str, device: str) -> torch.autocast:
    """Return the autocast context that a precision of `PRECISIONS` runs under."""
    return torch.autocast(device, dtype=torch.bfloat16, enabled=precision == "amp")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that every benchmark has."""
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--threads",
        type=int,
        default=fitting_threads(count_cores()),
        help="threads of PyTorch on the CPU (default: as many as it has cores to run on)",
    )
    parser.add_argument("--quick", action="store_true", help="few models and short runs: a look, not a measurement")
    parser.add_argument("--seconds", type=float, help="seconds measured per case")
    parser.add_argument("--runs", type=int, help="runs per case that are enough in less time")
    parser.add_argument("--turns", type=int, help="how often the cases take turns")
    parser.add_argument("--warmup", type=float, help="seconds of warm-up per case")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")


def set_up(arguments: argparse.Namespace, *, full: Plan = FULL, quick: Plan = QUICK) -> Plan:
    """Set threads and seeds as the arguments say, log the threads, and return how long to measure.

    Args:
        arguments: Of the command line.
        full: The plan where the arguments give nothing else.
        quick: The same with ``--quick``.
    """
    torch.set_num_threads(arguments.threads)
    logger.info("%s", describe_threads(count_cores()))
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True
    given = {name: getattr(arguments, name) for name in ("warmup", "seconds", "runs", "turns")}
    return replace(
        quick if arguments.quick else full, **{name: value for name, value in given.items() if value is not None}
    )


def main(parse: Callable[[], argparse.Namespace], run: Callable[[argparse.Namespace], object]) -> NoReturn:
    """Run a benchmark as the command line says, with its log on the screen; end the process with its exit code."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    arguments = parse()

    def body() -> None:
        run(arguments)

    sys.exit(exit_code(body))


def failure_of(case: Any, batch: int, error: Exception) -> dict[str, Any]:
    """Say that a case does not run; return its row of the result file, with the first line of the reason."""
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    logger.warning("%s, batch %d does not run: %s", case, batch, reason)
    return {**vars(case), "batch": batch, "reason": reason}


def _git(*command: str) -> str:
    """Return what git prints; nothing outside a repository."""
    try:
        done = subprocess.run(["git", *command], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()


def _cpu() -> tuple[str, list[str]]:
    """Return the processor's name and those of its instruction sets that matter here."""
    path = Path("/proc/cpuinfo")
    text = path.read_text() if path.is_file() else ""
    name = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
    present = set(flags[1].split()) if flags else set()
    features = [feature for feature in _CPU_FEATURES if feature in present]
    return name[1] if name else platform.processor() or platform.machine(), features


def describe_machine(device: str) -> dict[str, Any]:
    """Return what a figure depends on: processor, threads, versions, revision, the backend of the scan, the load."""
    cpu, features = _cpu()
    scan = choose(device)
    machine = {
        "device": device,
        "cpu": cpu,
        "cpu_features": features,
        "cores": count_cores().count,
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "platform": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "scan_backend": {"name": scan.name, "reason": scan.reason},
        "revision": _git("rev-parse", "--short", "HEAD") or "unknown",
        "has_local_changes": bool(_git("--no-optional-locks", "status", "--porcelain", "--untracked-files=no")),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        machine["gpu"] = properties.name
        machine["gpu_memory_bytes"] = properties.total_memory
        machine["cuda"] = torch.version.cuda
        machine["cudnn"] = torch.backends.cudnn.version()
        machine["tf32"] = {
            "convolution": torch.backends.cudnn.allow_tf32,
            "matmul": torch.backends.cuda.matmul.allow_tf32,
        }
    return machine


def summary_line(machine: Mapping[str, Any]) -> str:
    """Return the machine in one line, for above a table."""
    where = f"{machine['gpu']}, " if machine["device"] == "cuda" else ""
    changes = " with local changes" if machine["has_local_changes"] else ""
    return (
        f"{where}{machine['cpu']}, {machine['threads']} of {machine['cores']} cores, torch {machine['torch']}, "
        f"scan: {machine['scan_backend']['name']}, revision {machine['revision']}{changes}, "
        f"load {machine['load_average']:.1f}"
    )


def table(rows: Sequence[Sequence[Any]], header: Sequence[str]) -> str:
    """Return a Markdown table: floats to three significant digits, None as a dash, numbers to the right."""
    cells = [[_cell(value) for value in row] for row in rows]
    is_number = [all(not isinstance(row[i], str) for row in rows) for i in range(len(header))]
    return markdown_table(header, cells, is_right=is_number)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return str(value)


def result_path(arguments: argparse.Namespace, benchmark: str, machine: Mapping[str, Any]) -> Path:
    """Return where a benchmark's figures go, without a suffix: named after it, the machine and the threads."""
    place = machine["gpu"] if machine["device"] == "cuda" else f"{machine['cpu']} {machine['threads']} threads"
    name = re.sub(r"[^a-z0-9]+", "-", f"{benchmark} {place}".lower()).strip("-")
    arguments.out.mkdir(parents=True, exist_ok=True)
    return arguments.out / f"{name}{'-quick' if arguments.quick else ''}"


def save_result(
    path: Path, benchmark: str, machine: Mapping[str, Any], arguments: argparse.Namespace, **figures: Any
) -> Path:
    """Write a result file: what was measured, where, with which settings.

    Args:
        path: From `result_path`.
        benchmark: Name of the module.
        machine: From `describe_machine`.
        arguments: Of the command line; folders are left out.
        **figures: What was measured, as JSON.

    Returns:
        The file's path.
    """
    settings = {key: value for key, value in vars(arguments).items() if not isinstance(value, Path)}
    content = {"benchmark": benchmark, "machine": machine, "settings": settings, **figures}
    path = path.with_name(path.name + ".json")
    path.write_text(_compact_json(content) + "\n")
    return path


def _compact_json(content: Mapping[str, Any]) -> str:
    """Return JSON with an entry of the content a line, and a row of a table a line."""
    entries = []
    for key, value in content.items():
        text = json.dumps(value)
        if isinstance(value, list) and value and isinstance(value[0], dict):
            text = "[\n" + ",\n".join(f"  {json.dumps(row)}" for row in value) + "\n ]"
        entries.append(f" {json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(entries) + "\n}"


def save_and_draw(
    benchmark: str, machine: Mapping[str, Any], arguments: argparse.Namespace, plan: Plan, figures: Mapping[str, Any]
) -> dict[str, Any]:
    """Write the result file of a benchmark and its picture, and print where they are.

    Args:
        benchmark: Name of the module.
        machine: From `describe_machine`.
        arguments: Of the command line.
        plan: How long was measured.
        figures: What was measured, as JSON.

    Returns:
        The result, as `benchmarks.plots` draws it.
    """
    path = result_path(arguments, benchmark, machine)
    saved = save_result(path, benchmark, machine, arguments, plan=vars(plan), **figures)
    from .plots import draw  # needs matplotlib, which measuring does not

    result = {"benchmark": benchmark, "machine": machine, **figures}
    print(f"\n{saved}\n{draw(result, path)}")
    return result
