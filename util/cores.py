"""The cores that this process may use, and as many threads."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

__all__ = ["Cores", "count_cores", "describe_threads", "fitting_threads", "limit_threads"]

# Whoever sets one of these has chosen.
CHOICES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


@dataclass(frozen=True, kw_only=True, slots=True)
class Cores:
    """The cores of one process.

    Attributes:
        count: How many, 1 at least.
        reason: Why so many, for the log.
    """

    count: int
    reason: str


def count_cores(root: Path = Path("/")) -> Cores:
    """Count the cores that this process may use.

    Its affinity and the CPU limit of its control group, rounded up, are honoured; processes that torchrun started on
    this machine share the cores.

    Args:
        root: Where ``proc`` and ``sys`` are.
    """
    if hasattr(os, "sched_getaffinity"):
        count, reason = len(os.sched_getaffinity(0)), "by affinity"
    else:
        count, reason = os.cpu_count() or 1, "in the machine"
    reason = f"{count} {'core' if count == 1 else 'cores'} {reason}"
    limit = min(_limits(root), default=math.inf)
    if limit < count:
        count, reason = math.ceil(limit), f"the control group's limit of {limit:g} cores"
    processes = os.environ.get("LOCAL_WORLD_SIZE", "1")
    if processes.isdecimal() and int(processes) > 1:
        count, reason = count // int(processes), f"{reason}, shared by {processes} processes"
    return Cores(count=max(1, count), reason=reason)


def fitting_threads(cores: Cores) -> int:
    """Return how many threads PyTorch is to have: no more than cores, unless the user has chosen."""
    count = torch.get_num_threads()
    return count if any(name in os.environ for name in CHOICES) else min(count, cores.count)


def limit_threads(cores: Cores) -> None:
    """Let PyTorch, and with it the compiled kernels, have no more threads than fit."""
    if (count := fitting_threads(cores)) < torch.get_num_threads():
        torch.set_num_threads(count)


def describe_threads(cores: Cores) -> str:
    """Return how many threads PyTorch and the kernels have, and why."""
    chosen = next((name for name in CHOICES if name in os.environ), None)
    count = torch.get_num_threads()
    return f"{count} {'thread' if count == 1 else 'threads'} ({cores.reason if chosen is None else f'{chosen} is set'})"


def _limits(root: Path) -> Iterator[float]:
    """Yield the CPU limits, in cores, of this process's control groups and of those that these are in."""
    for line in _lines(root / "proc/self/cgroup"):
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        group = Path(path.lstrip("/"))
        for place in (group, *group.parents):
            if not controllers:
                limit = _first_words(root / "sys/fs/cgroup" / place / "cpu.max")
            elif "cpu" in controllers.split(","):
                limit = _version_1(root / "sys/fs/cgroup" / controllers / place)
                limit = limit or _version_1(root / "sys/fs/cgroup/cpu" / place)
            else:
                break
            if len(limit) == 2 and all(word.isdecimal() for word in limit) and int(limit[1]) > 0:
                yield int(limit[0]) / int(limit[1])


def _version_1(folder: Path) -> list[str]:
    """Return quota and period, in microseconds: a quota of -1 is none."""
    return [*_first_words(folder / "cpu.cfs_quota_us"), *_first_words(folder / "cpu.cfs_period_us")]


def _first_words(path: Path) -> list[str]:
    return next((line.split() for line in _lines(path)), [])


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:  # other systems, and groups that lie outside of what a container sees
        return []
