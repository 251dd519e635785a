"""Runs of a small network in this process, and run.py in its own processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from trainer_cases import CONFIG, REPOSITORY, TINY_NETWORK, free_port, short_run, write_class_folders

from configs import load_config
from trainer import Run, build_run
from trainer.checkpoint import load_training_checkpoint
from trainer.train import train
from util.distributed import Process


@pytest.fixture(scope="module", autouse=True)
def _one_thread(one_thread):
    """For every module here."""


@pytest.fixture(scope="session")
def class_folders(tmp_path_factory) -> Path:
    """3 classes, 24 training images, 15 test images: an odd number."""
    return write_class_folders(tmp_path_factory.mktemp("data") / "squares")


@pytest.fixture
def overrides(class_folders, tmp_path):
    """Return the overrides of a short run, with more of them."""
    return lambda *more: short_run(class_folders, tmp_path / "runs", *more)


@pytest.fixture
def build(overrides):
    """Set up a training run of a small timm network in this process."""

    def make(*more: str, mode: str = "train") -> Run:
        return build_run(load_config(CONFIG, overrides(*TINY_NETWORK, *more), mode=mode), Process())

    return make


@pytest.fixture
def finish(build):
    """Train to the end; return the run and its last checkpoint."""

    def do(*more: str, mode: str = "train"):
        run = build(*more, mode=mode)
        assert train(run) == 0
        return run, load_training_checkpoint(run.folder / "latest_ckpt.pth")

    return do


@pytest.fixture
def launch():
    """Run run.py in its own processes; return the completed process, with stdout and stderr as text."""

    def do(*arguments: str, num_processes: int = 1, launcher: str = "torch.distributed.launch", env=None, check=None):
        command = [sys.executable]
        if num_processes > 1:
            command += ["-m", launcher, f"--nproc_per_node={num_processes}", "--nnodes=1"]
            command += ["--use_env"] if launcher == "torch.distributed.launch" else []
        done = subprocess.run(
            [*command, "run.py", *arguments],
            cwd=REPOSITORY,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PET_MASTER_PORT": str(free_port()), **(env or {})},
            capture_output=True,
            text=True,
            timeout=300,
        )
        if check is not None:
            assert done.returncode == check, done.stdout + done.stderr
        return done

    return do
