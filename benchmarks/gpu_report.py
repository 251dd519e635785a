"""Everything to know of MobileMamba on a GPU, checked and timed by one command.

    python -m benchmarks.gpu_report [--minutes 8] [--out FOLDER] [--kernels FOLDER] [--skip-done]
    python -m benchmarks.gpu_report --plan
    python -m benchmarks.gpu_report --table FOLDER/gpu-report.jsonl

Each step has a process of its own, with a limit of time, the most wanted first. Every figure is a line of JSON in
FOLDER/gpu-report.jsonl as soon as it is known; what the steps print is in FOLDER/gpu-report.log, and at the end the
tables are in FOLDER/gpu-report.md. A step that fails harms no other, and --skip-done takes up where an earlier run has
ended. Without a GPU, --device cpu runs every step in small.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.metadata
import json
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from .common import RESULTS
from .gpu.context import Settings
from .gpu.figures import FILE
from .gpu.runner import Runner
from .gpu.steps import STEPS, Step
from .gpu.tables import tables
from .parsers import new_parser

__all__ = ["main", "parse", "plan"]

MINUTES = 8.0
PACKAGE = "mobilemamba_kernels"
TABLES = "gpu-report.md"


def plan(steps: Sequence[Step], *, minutes: float) -> str:
    """Return what a run would do, with the time that each step is planned to take on a GPU."""
    lines = []
    clock = behind = 0.0
    for step in steps:
        if step.is_timed:
            clock, behind = max(clock, behind), 0.0
        marks = " (beside the next ones)" if step.is_behind else ""
        late = " - left out, if all before take their time" if clock > 60 * minutes else ""
        lines.append(
            f"{clock:5.0f} s  {step.name:14} {step.seconds:4} s, at most {step.limit:4} s  {step.title}{marks}{late}"
        )
        if step.is_behind:
            behind = clock + step.seconds
        else:
            clock += step.seconds
    return "\n".join([*lines, f"{max(clock, behind):5.0f} s  end; the budget is {60 * minutes:.0f} s"])


def kernels_folder(path: Path) -> Path:
    """Return the folder to put on Python's path for a prebuilt package of kernels.

    Args:
        path: The package's folder, or the one that holds it.

    Raises:
        ValueError: If it is no such package, or was built for another PyTorch.
    """
    package = path if (path / "build.json").is_file() else path / PACKAGE
    try:
        built = json.loads((package / "build.json").read_text())
        library = package / built["library"]
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"--kernels {path}: no {PACKAGE} with a build.json there ({error})") from error
    if package.name != PACKAGE or not library.is_file():
        raise ValueError(f"--kernels {path}: give the folder {PACKAGE} that pip installed, with its library")
    running = importlib.metadata.version("torch").split("+")[0]
    if built["torch"] != running:
        raise ValueError(f"--kernels {path}: built for torch {built['torch']}, this is {running}; build it again")
    return package.resolve().parent


def parse(command_line: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the arguments, checked."""
    parser = new_parser("gpu_report", __doc__)
    parser.add_argument("--out", type=Path, default=RESULTS / "gpu", help="folder for the figures and the log")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="budget for all steps together")
    parser.add_argument("--steps", nargs="+", choices=list(STEPS), default=list(STEPS), help="which, in their order")
    parser.add_argument("--skip-done", action="store_true", help="leave out figures that --out has from earlier runs")
    parser.add_argument("--kernels", type=Path, help=f"folder with a prebuilt {PACKAGE} to use")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: every step in small")
    parser.add_argument("--compiler", help="backend of torch.compile (GPU: inductor; CPU: aot_eager, as it is quick)")
    parser.add_argument("--plan", action="store_true", help="print the steps and their planned times, and end")
    parser.add_argument("--table", nargs="+", type=Path, metavar="FILE", help="print the figures in FILE as Markdown")
    arguments = parser.parse_args(command_line)
    arguments.compiler = arguments.compiler or ("inductor" if arguments.device == "cuda" else "aot_eager")
    arguments.steps = [step for name, step in STEPS.items() if name in arguments.steps]
    try:
        arguments.kernels = arguments.kernels and kernels_folder(arguments.kernels)
    except ValueError as error:
        parser.error(str(error))
    missing = [str(path) for path in arguments.table or () if not path.is_file()]
    if missing:
        parser.error(f"--table: there is no file {', '.join(missing)}")
    if not (arguments.plan or arguments.table) and arguments.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            parser.error("PyTorch finds no GPU here: --device cpu runs every step in small")
    return arguments


@contextlib.contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Let SIGTERM, which a limit of time sends, end the steps too."""
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def main(command_line: Sequence[str] | None = None) -> int:
    """Run from the command line; return 1 if something was left out, or did not pass."""
    arguments = parse(command_line)
    if arguments.table:
        print(tables(arguments.table))
        return 0
    if arguments.plan:
        print(plan(arguments.steps, minutes=arguments.minutes))
        return 0
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    settings = Settings(
        device=arguments.device,
        is_small=arguments.device == "cpu",
        run=datetime.datetime.now(datetime.timezone.utc).strftime("%Y%m%d-%H%M%S"),
        compiler=arguments.compiler,
    )
    runner = Runner(
        out,
        settings,
        seconds=60 * arguments.minutes,
        is_resumed=arguments.skip_done,
        kernels=arguments.kernels,
    )
    with _ended_by_sigterm():
        is_well = runner.run(arguments.steps)
    (out / TABLES).write_text(tables([out / FILE]) + "\n", encoding="utf-8")
    print(f"{out / FILE}\n{out / TABLES}")
    return 0 if is_well else 1


if __name__ == "__main__":
    raise SystemExit(main())
