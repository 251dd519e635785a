"""Runs the steps of a report in processes of their own, within a budget of time.

A step that crashes is started again without the case that it was at; one that runs out of time is stopped. The next
process imports PyTorch while a step is at work.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import IO, Any

from ..common import REPOSITORY
from .context import Settings
from .figures import FILE, Figures, read
from .steps import Step
from .worker import DEVICE_LOST

__all__ = ["LOG", "Runner"]

LOG = "gpu-report.log"
WORKER = (sys.executable, "-m", "benchmarks.gpu.worker")
MAX_CRASHES = 4  # of one step
SMALLEST_SECONDS = 15  # a step is not started with less
CPU_FACTOR = 20  # by which steps may take longer on a CPU
POLL_SECONDS = 0.05


class _Process:
    """A worker that has imported, or is importing, and waits for its orders."""

    def __init__(self, command: Sequence[str], log: IO[bytes], environment: Mapping[str, str]) -> None:
        self.process = subprocess.Popen(
            command,
            cwd=REPOSITORY,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=dict(environment),
            start_new_session=True,  # to be killed with all its children
        )

    def order(self, orders: Mapping[str, Any]) -> None:
        """Tell it what to do. It hears when this process ends, as its stdin is closed then."""
        assert self.process.stdin
        with contextlib.suppress(OSError):  # it has died already: its exit code says so
            self.process.stdin.write(json.dumps(orders).encode() + b"\n")
            self.process.stdin.flush()

    def kill(self) -> None:
        """End it and its children."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        if self.process.stdin:
            with contextlib.suppress(OSError):
                self.process.stdin.close()


class _Job:
    """A step at work: its process, and when it must end."""

    def __init__(self, step: Step, process: _Process, current: Path, *, deadline: float, num_crashes: int = 0) -> None:
        self.step = step
        self.process = process
        self.current = current
        self.deadline = deadline
        self.num_crashes = num_crashes
        self.start = time.monotonic()

    def case(self) -> dict[str, Any]:
        """Return the case that the process was at last; empty before the first."""
        try:
            return json.loads(self.current.read_text())
        except (OSError, ValueError):
            return {}


class Runner:
    """Runs steps.

    Args:
        out: Folder for the file of figures and the log; made when missing.
        settings: For the workers; the file and the folder are filled in.
        seconds: The budget.
        is_resumed: Whether figures of earlier runs count as done.
        kernels: Folder that holds the package of compiled kernels to use; None: the installed one.
        command: Starts a worker.
    """

    def __init__(
        self,
        out: Path,
        settings: Settings,
        *,
        seconds: float,
        is_resumed: bool = False,
        kernels: Path | None = None,
        command: Sequence[str] = WORKER,
    ) -> None:
        self.command = command
        self.settings = settings
        self.figures = Figures(out / FILE, settings.run)
        self.is_resumed = is_resumed
        self.environment = {**os.environ, "PYTHONUNBUFFERED": "1"}  # what a killed worker has said is in the log
        if kernels is not None:
            self.environment["PYTHONPATH"] = os.pathsep.join(
                [str(kernels), *filter(None, [self.environment.get("PYTHONPATH")])]
            )
        self._end = time.monotonic() + seconds
        self._log_path = out / LOG
        self._spare: _Process | None = None
        self._behind: list[_Job] = []
        self._processes: list[_Process] = []

    def run(self, steps: Sequence[Step]) -> bool:
        """Run the steps in their order.

        Returns:
            Whether all of them came to their end, and nothing in them failed.
        """
        is_complete = True
        with contextlib.ExitStack() as stack:
            self._log = stack.enter_context(self._log_path.open("ab"))
            self._folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gpu-report-")))
            stack.callback(self._kill_all)
            for step in steps:
                is_complete = self._run_step(step) and is_complete
            is_complete = self._wait_behind() and is_complete
        return is_complete and not self._failures()

    def _run_step(self, step: Step) -> bool:
        is_complete = self._wait_behind() if step.is_timed else True
        remaining = self._end - time.monotonic()
        if remaining < SMALLEST_SECONDS:
            self._end_step(step, f"left out: {max(0, remaining):.0f} s were left of the budget", 0.0)
            return False
        job = self._start(step)
        if step.is_behind:
            self._behind.append(job)
            return is_complete
        return self._wait(job) and is_complete

    def _start(self, step: Step, *, deadline: float | None = None, num_crashes: int = 0) -> _Job:
        process = self._spare or self._new_process()
        self._spare = self._new_process()
        if deadline is None:
            factor = CPU_FACTOR if self.settings.device == "cpu" else 1
            deadline = min(self._end, time.monotonic() + factor * step.limit)
        current = self._folder / f"{step.name}.json"
        current.unlink(missing_ok=True)
        settings = asdict(replace(self.settings, path=str(self.figures.path), folder=str(self._folder)))
        process.order({"step": step.name, "settings": settings, "current": str(current), "is_resumed": self.is_resumed})
        return _Job(step, process, current, deadline=deadline, num_crashes=num_crashes)

    def _new_process(self) -> _Process:
        process = _Process(self.command, self._log, self.environment)
        self._processes.append(process)
        return process

    def _wait(self, job: _Job) -> bool:
        """Wait for a step, and start it again where it crashes; return whether it came to its end."""
        while True:
            code = self._exit_code(job)
            seconds = time.monotonic() - job.start
            job.process.kill()  # with what it has left behind
            if code == 0:
                return self._end_step(job.step, "", seconds)
            case = job.case()
            if code is None:
                reason = f"stopped after {seconds:.0f} s" + (f", at {case}" if case else "")
                return self._end_step(job.step, reason, seconds)
            error = "the GPU no longer answers" if code == DEVICE_LOST else f"the process ended with {code}"
            if code != DEVICE_LOST and case:
                self.figures.write(job.step.name, case, seconds=seconds, passed=False, error=error, figures={})
            if not case or job.num_crashes == MAX_CRASHES:
                return self._end_step(job.step, error, seconds)
            job = self._start(job.step, deadline=job.deadline, num_crashes=job.num_crashes + 1)

    def _exit_code(self, job: _Job) -> int | None:
        """Return a process's exit code, None if time runs out first."""
        try:
            return job.process.process.wait(max(POLL_SECONDS, job.deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            return None

    def _wait_behind(self) -> bool:
        jobs, self._behind = self._behind, []
        ends = [self._wait(job) for job in jobs]
        return all(ends)

    def _end_step(self, step: Step, reason: str, seconds: float) -> bool:
        """Note the end of a step, and say so; return whether it ran to its end."""
        lines = [
            line for line in read(self.figures.path) if line["run"] == self.settings.run and line["step"] == step.name
        ]
        failed = [line for line in lines if line["case"] and line["passed"] is False]
        self.figures.write(step.name, {}, seconds=round(seconds, 3), stopped=reason)
        count = sum(bool(line["case"]) for line in lines)
        print(
            f"{step.name:14} {seconds:6.1f} s, {count} figures, {len(failed)} failed"
            + (f"; {reason}" if reason else ""),
            flush=True,
        )
        for line in failed[:5]:
            print(f"    {line['case']}: {line['error'] or json.dumps(line['figures'])[:400]}", flush=True)
        return not reason

    def _failures(self) -> bool:
        return any(line["run"] == self.settings.run and line.get("passed") is False for line in read(self.figures.path))

    def _kill_all(self) -> None:
        for process in self._processes:
            if process.process.poll() is None:
                process.kill()
