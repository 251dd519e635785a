"""A profile of some steps: a trace for Perfetto (ui.perfetto.dev) or chrome://tracing, and a table of operators."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch.profiler import profile

from model.profile_trace import new_trace
from util.logging import LogGuard

__all__ = ["StepProfiler"]

logger = logging.getLogger(__name__)

NUM_ROWS = 50  # of the table


class StepProfiler:
    """Profiles steps of this process; a profile that cannot be taken or written is reported, and the run continues.

    Args:
        steps: Steps since the run was started or resumed, counted from 1; none where it is empty.
        folder: Takes ``profile-FIRST-LAST.json``, the trace, and ``.txt``, the table.
        device: Where the steps compute.
    """

    def __init__(self, steps: range, folder: Path, device: torch.device) -> None:
        self._steps = steps
        self._path = folder / (f"profile-{steps[0]}-{steps[-1]}.json" if steps else "profile.json")
        self._device = device
        self._guard = LogGuard()
        self._profile: profile | None = None

    def before(self, step: int) -> None:
        """Start with the first step."""
        if self._steps and step == self._steps[0]:
            self._guard(self._path, self._start)

    def after(self, step: int) -> None:
        """Stop after the last step."""
        if self._steps and step == self._steps[-1]:
            self.close()

    def close(self) -> None:
        """Stop, and write what there is of the profile."""
        if self._profile is not None:
            self._guard(self._path, self._stop, self._profile)
            self._profile = None

    def _start(self) -> None:
        self._profile = new_trace(self._device)
        self._profile.start()

    def _stop(self, taken: profile) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        taken.stop()
        taken.export_chrome_trace(str(self._path))
        order = "self_device_time_total" if self._device.type == "cuda" else "self_cpu_time_total"
        table = taken.key_averages().table(sort_by=order, row_limit=NUM_ROWS)
        self._path.with_suffix(".txt").write_text(table, encoding="utf-8")
        logger.info("the profile of steps %d to %d is in %s", self._steps[0], self._steps[-1], self._path)
