"""Data workers that cannot be started or die: which, why, and the way out."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from trainer_cases import CONFIG, REPOSITORY, TINY_NETWORK, short_run

from data import worker_failures
from data.loaders import PIPES_PER_WORKER
from trainer.train import train
from util.errors import RunError


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("DataLoader worker (pid 7) is killed by signal: Killed. ", "memory probably ran out"),
        ("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible", "docker run --shm-size"),
        (
            "Caught RuntimeError in DataLoader worker process 3.\nOriginal Traceback (most recent call last):\n  ...\n"
            "RuntimeError: unable to write to file </torch_7_1_0>: No space left on device (28)\n",
            r"worker process 3\. RuntimeError: unable to write .*; shared memory \(/dev/shm\) is full",
        ),
        ("unable to open shared memory object </torch_7> in read-write mode: Too many open files (24)", "ulimit -n"),
        ("received 0 items of ancdata", "ulimit -n"),
        ("unable to mmap 4096 bytes from file </torch_7>: Cannot allocate memory (12)", "memory probably ran out"),
        ("DataLoader worker (pid(s) 7) exited unexpectedly", "if memory ran out, free some"),
    ],
)
def test_the_message_tells_the_rank_the_cause_and_the_way_out(text, told):
    expected = rf"^a data worker died on rank 1 \(.*{told}.*lower trainer\.data\.num_workers_per_gpu \(now 4\)"
    with pytest.raises(RunError, match=expected), worker_failures(4, rank=1):
        raise RuntimeError(text)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"), "Connection reset by peer.*memory"),
        (EOFError(), "EOFError"),
        (OSError(errno.EMFILE, "Too many open files"), "ulimit -n"),
    ],
    ids=["reset", "end", "files"],
)
def test_a_broken_pipe_to_a_worker_is_told_of(build, monkeypatch, error, told):
    run = build("trainer.data.num_workers_per_gpu=2")

    def broken():
        yield from ()
        raise error

    monkeypatch.setattr(run.loaders.train._batches, "_loader", broken())
    with pytest.raises(RunError, match=rf"a data worker died on rank 0 \(.*{told}.*there is no checkpoint yet"):
        train(run)


def num_open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_too_few_files_are_told_of_before_a_worker_starts(build):
    run = build("trainer.data.num_workers_per_gpu=2")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = num_open_files()
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (used + PIPES_PER_WORKER, limits[1]))
        with pytest.raises(RunError, match=r"Too many open files\); .*`ulimit -n 65536`"):
            next(run.loaders.train.iterate(0))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert num_open_files() == used
    next(run.loaders.train.iterate(0))


SMALL_SHM = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs -o size=1m tmpfs /dev/shm && exec "$@"', "sh"]


def test_shared_memory_that_is_full_is_told_of(class_folders, tmp_path):
    if shutil.which("unshare") is None or subprocess.run([*SMALL_SHM, "true"], capture_output=True).returncode:
        pytest.skip("needs the permission to mount a small /dev/shm")
    short = short_run(class_folders, tmp_path / "runs", *TINY_NETWORK, "size=224", "trainer.data.num_workers_per_gpu=1")
    command = [*SMALL_SHM, sys.executable, "run.py", "-c", CONFIG, "-m", "train", *short]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: a data worker died on rank 0 (")
    assert line.count("shared memory (/dev/shm) is full, small or read-only: enlarge it (docker run --shm-size=8g") == 1
    assert line.endswith("there is no checkpoint yet")


def test_shared_memory_that_cannot_be_written_is_told_of(build, monkeypatch):
    run = build("trainer.data.num_workers_per_gpu=2")

    class ReadOnly:
        def Semaphore(self):  # the name of multiprocessing's
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr("data.loaders.multiprocessing.get_context", ReadOnly)
    with pytest.raises(
        RunError, match=r"Read-only file system\); shared memory \(/dev/shm\) is full, small or read-only"
    ):
        next(run.loaders.train.iterate(0))
