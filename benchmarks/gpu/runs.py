"""Whole programs: run.py on handwritten digits, NVIDIA's sanitizer on the scan, the tests of the suite."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ..common import REPOSITORY
from .context import Cases, Context

__all__ = ["find_sanitizer", "programs", "sanitizer", "tests"]

CONFIG = "configs/quickstart"
EXIT_TERMINATED = 143
TOP1_AIM = 90.0  # percent, of a short run; the full one reaches 98
SANITIZER_ERROR = 77  # exit code that is asked of it
TOOLS = ("memcheck", "racecheck")
TAIL = 1500  # characters of a program's output that are kept


def programs(context: Context) -> Cases:
    """Train on digits, stop and resume, test, compile, and start through torchrun: each run.py in its own process."""
    steps = {
        "prepare digits": _prepare,
        "train, stopped by SIGTERM": _train,
        "resume": _resume,
        "test": _test,
        "trainer.compile=true": _compile,
        "torchrun with one process": _torchrun,
    }
    for name, step in steps.items():
        yield {"program": name}, functools.partial(step, context)


def _prepare(context: Context) -> dict[str, Any]:
    """Write the digits; all other programs read them."""
    return _program(["-m", "data.prepare", "digits", str(_digits(context))])


def _train(context: Context) -> dict[str, Any]:
    """Train until the first epoch is done, then send SIGTERM: the state is saved."""
    shutil.rmtree(_runs(context), ignore_errors=True)
    command = ["run.py", "-c", CONFIG, "-m", "train", *_options(context, "trained")]
    return _program(command, stop_at="Epoch 1:", expected=EXIT_TERMINATED)


def _resume(context: Context) -> dict[str, Any]:
    """Resume from there to the end."""
    if not _folders(context):  # its first part was in an earlier report
        _prepare(context)
        _train(context)
    resumed = f"trainer.resume_dir={_folders(context)[-1]}"
    return _program(["run.py", "-c", CONFIG, "-m", "train", *_options(context, "trained"), resumed])


def _test(context: Context) -> dict[str, Any]:
    """Test the averaged weights."""
    if not _folders(context):
        _resume(context)
    weights = f"model.model_kwargs.checkpoint_path={_folders(context)[-1] / 'net_E.pth'}"
    figures = _program(["run.py", "-c", CONFIG, "-m", "test", *_options(context, "trained"), weights])
    found = re.search(r"Test \w+: top-1 ([0-9.]+)", figures["output"])
    top1 = float(found[1]) if found else None
    is_well = figures["passed"] and top1 is not None
    # A rehearsal is too short to learn much.
    return {**figures, "top1": top1, "passed": is_well and (top1 >= TOP1_AIM or not context.is_cuda)}


def _compile(context: Context) -> dict[str, Any]:
    """Train one epoch compiled, in bfloat16; on a CPU in float32, as many take bfloat16 channel by channel."""
    precision = "trainer.amp_dtype=bfloat16" if context.is_cuda else "trainer.scaler=none"
    more = ("epoch_full=1", "trainer.compile=true", precision)
    command = ["run.py", "-c", CONFIG, "-m", "train", *_options(context, "compiled"), *more]
    # For a CPU, a C++ compiler would take a quarter of an hour: everything around the compiler runs.
    return _program(command, environment={} if context.is_cuda else {"TORCH_COMPILE_DISABLE": "1"})


def _torchrun(context: Context) -> dict[str, Any]:
    """Train one epoch as a launcher starts it, in full precision."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1"]
    more = ("epoch_full=1", "trainer.scaler=none")
    return _program([*launcher, "run.py", "-c", CONFIG, "-m", "train", *_options(context, "launched"), *more])


def _digits(context: Context) -> Path:
    return context.folder / "digits"


def _runs(context: Context) -> Path:
    return context.folder / "runs"


def _options(context: Context, name: str) -> list[str]:
    return [
        f"data.root={_digits(context)}",
        f"trainer.checkpoint={_runs(context) / name}",
        f"trainer.device={context.device}",
        f"epoch_full={context.scale.epochs}",
        "trainer.scaler=native",
        "trainer.save_per_epoch=1",
    ]


def _folders(context: Context) -> list[Path]:
    """Return the folders of the training runs so far."""
    return sorted(path for path in (_runs(context) / "trained").glob("*") if path.is_dir())


def _program(
    arguments: Sequence[str],
    *,
    executable: Sequence[str] = (),
    environment: Mapping[str, str] = MappingProxyType({}),
    stop_at: str = "",
    expected: int = 0,
) -> dict[str, Any]:
    """Run Python in its own process, in the repository; return its exit code and the end of its output.

    Args:
        arguments: Of Python.
        executable: What runs Python, if not the system.
        environment: Variables besides this process's own.
        stop_at: Send SIGTERM when this appears in the output.
        expected: The exit code of a program that passes.
    """
    process = subprocess.Popen(
        [*executable, sys.executable, *arguments],
        cwd=REPOSITORY,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env={**os.environ, "PYTHONUNBUFFERED": "1", **environment},
    )
    assert process.stdout
    lines = []
    for line in process.stdout:
        sys.stdout.write(line)
        lines.append(line)
        if stop_at and stop_at in line:
            process.send_signal(signal.SIGTERM)
            stop_at = ""
    code = process.wait()
    return {"exit_code": code, "output": "".join(lines)[-TAIL:], "passed": code == expected}


def find_sanitizer() -> str | None:
    """Return NVIDIA's compute-sanitizer, on the path or in a CUDA toolkit; None where there is none."""
    roots = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    roots += sorted(Path("/usr/local").glob("cuda*"), reverse=True)
    places = [root / place for root in roots for place in ("bin", "compute-sanitizer", "extras/compute-sanitizer")]
    return shutil.which("compute-sanitizer", path=os.pathsep.join([os.environ.get("PATH", ""), *map(str, places)]))


def sanitizer(context: Context) -> Cases:
    """Run the scan at small shapes under memcheck, then under racecheck."""
    for tool in TOOLS:
        yield {"tool": tool}, functools.partial(_sanitize, context, tool)


def _sanitize(context: Context, tool: str) -> dict[str, Any]:
    found = find_sanitizer() if context.is_cuda else None
    if context.is_cuda and found is None:
        return {"problem": "compute-sanitizer is neither on the path nor in a CUDA toolkit here", "passed": None}
    executable = [found, "--tool", tool, "--error-exitcode", str(SANITIZER_ERROR)] if found else []
    shapes = ["x".join(map(str, shape)) for shape in context.scale.sanitizer_shapes]
    figures = _program(["-m", "benchmarks.gpu.sanitized", context.device, *shapes], executable=executable)
    summary = [line.strip("= ") for line in figures["output"].splitlines() if "SUMMARY" in line]
    return {**figures, "summary": summary}


def tests(context: Context) -> Cases:
    """Run the tests that need a GPU, where pytest is installed; elsewhere than on a GPU only collect them."""
    yield {"tests": "gpu"}, functools.partial(_pytest, context)


def _pytest(context: Context) -> dict[str, Any]:
    if importlib.util.find_spec("pytest") is None:
        return {"problem": "pytest is not installed here", "passed": None}
    only = [] if context.is_cuda else ["--collect-only"]
    figures = _program(["-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", *only, "tests/model/lib_mamba"])
    lines = figures["output"].strip().splitlines()
    return {**figures, "summary": lines[-1:]}
