"""One process of a report, which runs one step: it imports everything, then waits for its orders, a line on stdin.

It ends when its parent does: nothing is left on the GPU.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

from .context import Context, Settings
from .figures import key_of
from .steps import STEPS, cases_of

__all__ = ["DEVICE_LOST", "main", "run_step"]

DEVICE_LOST = 75  # exit code: the GPU no longer answers in this process


def run_step(name: str, context: Context, *, current: Path | None = None, is_resumed: bool = False) -> int:
    """Run the cases of a step, those that are done left out, and write their figures.

    Args:
        name: Of the step.
        context: What it is given.
        current: File that holds the case at work, for the parent to know what a crash has cost.
        is_resumed: Whether figures of earlier runs count as done.

    Returns:
        The exit code of the process.
    """
    done = context.figures.done(earlier=is_resumed)
    for case, function in cases_of(STEPS[name])(context):  # type: ignore[attr-defined]
        if key_of(name, case) in done:
            continue
        if current is not None:
            current.write_text(json.dumps(case))
        start = time.perf_counter()
        try:
            figures: dict[str, Any] = function()
            error = ""
        except Exception as raised:
            traceback.print_exc()
            figures, error = {}, f"{type(raised).__name__}: {raised}".strip().splitlines()[0]
        passed = False if error else figures.pop("passed", None)
        seconds = round(time.perf_counter() - start, 3)
        context.figures.write(name, case, seconds=seconds, passed=passed, error=error, figures=figures)
        if error and _is_device_lost(context):
            return DEVICE_LOST
    return 0


def _is_device_lost(context: Context) -> bool:
    """Return whether an earlier error has left this process without a GPU."""
    if not context.is_cuda:
        return False
    import torch

    try:
        torch.zeros(1, device=context.device).item()
    except RuntimeError:
        return True
    return False


def _end_with_parent() -> None:
    os.read(0, 1)  # returns when the parent's end of the pipe is closed
    os.killpg(os.getpgrp(), signal.SIGKILL)


def _import_all() -> None:
    for step in STEPS.values():
        cases_of(step)


def main() -> int:
    """Run the step that stdin names."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    _import_all()
    orders = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    context = Context(Settings(**orders["settings"]))
    current = Path(orders["current"])
    return run_step(orders["step"], context, current=current, is_resumed=orders["is_resumed"])


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # nothing that lives on may keep the process, and the GPU
