"""On a GPU: run.py in AMP and compiled, and groups of one process and of one for every GPU (pytest -m gpu).

Groups have a case on the CPU too, through gloo.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gpu_groups import loss_of, network_and_images
from trainer_cases import CONFIG, REPOSITORY, epoch_records, short_run

ALL = "all"


def on_gpu(*values):
    return pytest.param(*values, marks=pytest.mark.gpu)


def require_gpu():
    if not torch.cuda.is_available():
        pytest.skip("PyTorch finds no CUDA device")


@pytest.mark.parametrize(("device", "number"), [("cpu", 2), on_gpu("cuda", 1), on_gpu("cuda", ALL)])
def test_a_group_has_the_gradients_of_one_process_with_all_images(device, number, tmp_path):
    if device == "cuda":
        require_gpu()
        number = torch.cuda.device_count() if number == ALL else number
    script = Path(__file__).with_name("gpu_groups.py")
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    commands = [[sys.executable, script, device, str(rank), str(number), tmp_path] for rank in range(number)]
    processes = [subprocess.Popen(command, env=environment) for command in commands]
    assert [process.wait(300) for process in processes] == [0] * number
    network, images = network_and_images(number)
    loss_of(network, images).backward()
    for rank in range(number):
        found = torch.load(tmp_path / f"rank{rank}.pth", weights_only=True)
        assert found["total"].tolist() == [number * (number + 1) / 2] * 3
        trained = {name: own.grad for name, own in network.named_parameters() if own.grad is not None}
        assert found["gradients"].keys() == trained.keys()
        for name, exact in trained.items():
            error = (found["gradients"][name] - exact).abs().max()
            assert error <= 2e-3 * exact.abs().max() + 1e-7, name


@pytest.mark.gpu
@pytest.mark.parametrize(
    "options",
    [
        ("trainer.amp_dtype=float16",),
        ("trainer.amp_dtype=bfloat16", "trainer.channels_last=true"),
        ("trainer.amp_dtype=bfloat16", "trainer.compile=true"),
        ("trainer.scaler=none",),
    ],
    ids=", ".join,
)
def test_runs_on_a_gpu(options, launch, class_folders, tmp_path):
    """The scan's backend and the loss are in the log: the first is named, the second finite."""
    require_gpu()
    short = short_run(class_folders, tmp_path / "runs", "size=64", "trainer.device=cuda", *options)
    done = launch("-c", CONFIG, "-m", "train", *short, check=0)
    assert re.search(r"scan on cuda: (cuda|triton) backend", done.stdout), done.stdout
    (folder,) = (tmp_path / "runs").iterdir()
    losses = [record["train"]["CE"] for record in epoch_records(folder)]
    assert len(losses) == 2
    assert all(loss == loss and abs(loss) < 100 for loss in losses)
