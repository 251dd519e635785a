"""``run.py`` whose processes stand still or die where a test says so.

    python elastic.py MARKS [arguments of run.py]

A file ``WORLD_SIZE-RANK-ITERATION`` in the folder MARKS is such a place. The process that comes there renames it to
``....reached``. It then kills itself if the file says ``kill``; otherwise it stands still until the renamed file is
deleted or a signal comes.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import run
import trainer.train
from trainer import Run
from util.cli import interruptible

MARKS = Path(sys.argv.pop(1))
count_step = trainer.train._count_step


def stand_still(run: Run, step: trainer.train._LaunchedStep) -> trainer.train.StopError | None:
    """Count a step, then do what its mark says."""
    stop = count_step(run, step)
    mark = MARKS / f"{run.process.world_size}-{run.process.rank}-{step.iteration}"
    if mark.exists():
        reached = mark.rename(mark.with_suffix(".reached"))
        if reached.read_text() == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        while reached.exists() and run.watch.received is None:
            time.sleep(0.05)
    return stop


if __name__ == "__main__":
    trainer.train._count_step = stand_still
    sys.exit(interruptible(run.main))
