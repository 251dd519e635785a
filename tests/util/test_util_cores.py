"""Cores that a process may use, and as many threads: made-up control groups, real affinity."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from util.cores import CHOICES, count_cores

V1 = "2:memory:/\n1:cpu,cpuacct:/{}\n"
V2 = "0::/{}\n"
MOUNT_1 = "sys/fs/cgroup/cpu,cpuacct"
MOUNT_2 = "sys/fs/cgroup"
# Of this process: cores and threads after it was given as many cores as it is told.
COUNT = """
import os, sys, torch
from pathlib import Path
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:int(sys.argv[1])])
from util.cores import count_cores, describe_threads, limit_threads
cores = count_cores(Path(sys.argv[2]))
limit_threads(cores)
print(cores.count, torch.get_num_threads(), describe_threads(cores), sep="|")
"""


@pytest.fixture
def root(tmp_path):
    """Write files of a system: its folder."""

    def write(files):
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path

    return write


@pytest.fixture(autouse=True)
def eight_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)


@pytest.mark.parametrize(
    ("group", "files", "expected"),
    [
        (V2.format(""), {f"{MOUNT_2}/cpu.max": "300000 100000\n"}, 3),
        (V2.format(""), {f"{MOUNT_2}/cpu.max": "max 100000\n"}, 8),
        (V2.format("a/b"), {f"{MOUNT_2}/a/b/cpu.max": "max 100000\n", f"{MOUNT_2}/a/cpu.max": "150000 100000\n"}, 2),
        (V2.format("a"), {f"{MOUNT_2}/a/cpu.max": "50000 100000\n", f"{MOUNT_2}/cpu.max": "400000 100000\n"}, 1),
        (V2.format("a"), {f"{MOUNT_2}/a/cpu.max": "1600000 100000\n"}, 8),
        (V2.format("elsewhere"), {f"{MOUNT_2}/cpu.max": "200000 100000"}, 2),
        (
            V1.format("a"),
            {f"{MOUNT_1}/a/cpu.cfs_quota_us": "500000\n", f"{MOUNT_1}/a/cpu.cfs_period_us": "100000\n"},
            5,
        ),
        (V1.format("a"), {f"{MOUNT_1}/cpu.cfs_quota_us": "250000\n", f"{MOUNT_1}/cpu.cfs_period_us": "100000\n"}, 3),
        (V1.format(""), {f"{MOUNT_2}/cpu/cpu.cfs_quota_us": "2000\n", f"{MOUNT_2}/cpu/cpu.cfs_period_us": "1000"}, 2),
        (V1.format(""), {f"{MOUNT_1}/cpu.cfs_quota_us": "-1\n", f"{MOUNT_1}/cpu.cfs_period_us": "100000\n"}, 8),
        (V2.format(""), {f"{MOUNT_2}/cpu.max": ""}, 8),
    ],
    ids=[
        *("v2", "v2-none", "v2-parent", "v2-below-one", "v2-more-than-there-are", "v2-in-a-container"),
        *("v1", "v1-in-a-container", "v1-other-mount", "v1-none", "empty"),
    ],
)
def test_limits_of_control_groups(root, group, files, expected):
    cores = count_cores(root({"proc/self/cgroup": group} | files))
    assert cores.count == expected
    assert ("control group" in cores.reason) == (expected < 8)


@pytest.mark.parametrize(("processes", "expected"), [("1", 8), ("3", 2), ("20", 1), ("all", 8)])
def test_processes_of_a_machine_share_its_cores(tmp_path, monkeypatch, processes, expected):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
    assert count_cores(tmp_path).count == expected


def _counted(cores, root, **variables):
    environment = {name: value for name, value in os.environ.items() if name not in CHOICES}
    environment |= {"LOCAL_WORLD_SIZE": "1", **variables}
    command = [sys.executable, "-c", COUNT, str(cores), str(root)]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[2], env=environment, capture_output=True, text=True, check=True, timeout=120
    )
    return done.stdout.strip().split("|")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="affinity as Linux has it")
def test_threads_suit_the_affinity_and_the_limit_unless_the_user_has_chosen(root):
    limited = root({"proc/self/cgroup": V2.format(""), f"{MOUNT_2}/cpu.max": "100000 100000\n"})
    assert _counted(1, "/nowhere") == ["1", "1", "1 thread (1 core by affinity)"]
    assert _counted(64, limited) == ["1", "1", "1 thread (the control group's limit of 1 cores)"]
    threads = min(2, os.cpu_count())  # MKL has no more than there are cores
    expected = ["1", f"{threads}", f"{threads} {'thread' if threads == 1 else 'threads'} (OMP_NUM_THREADS is set)"]
    assert _counted(64, limited, OMP_NUM_THREADS="2") == expected
