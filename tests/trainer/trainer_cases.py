"""Synthetic data and comparisons for the trainer's tests."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import numpy as np
import torch
from PIL import Image

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIG = "configs/mobilemamba/mobilemamba_t2"
VARIED = ("config", "time_spent")  # of a checkpoint: differ in the folder's name and in time
CLASSES = ("blue", "green", "red")
TINY_NETWORK = ("model.name=timm_mobilenetv3_small_050", "model.model_kwargs.extra.drop_rate=0.2")


def write_class_folders(root: Path, *, train: int = 8, val: int = 5, size: int = 36) -> Path:
    """Write noisy squares, one colour a class."""
    generator = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for channel, name in enumerate(reversed(CLASSES)):
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = generator.integers(0, 120, (size, size, 3), dtype=np.uint8)
                pixels[..., channel] += 90
                Image.fromarray(pixels).save(folder / f"{index}.png")
    return root


def short_run(data: Path, runs: Path, *more: str) -> list[str]:
    """Return the overrides of a run of 2 epochs of 3 steps that takes seconds; later ones win."""
    return last_wins(
        [
            f"data.root={data}",
            f"trainer.checkpoint={runs}",
            "trainer.device=cpu",
            "trainer.data.num_workers_per_gpu=0",
            "nb_classes=3",
            "size=32",
            "batch_size=8",
            "epoch_full=2",
            "warmup_epochs=1",
            "trainer.ema=0.9",
            *more,
        ]
    )


def last_wins(arguments: list[str]) -> list[str]:
    return [f"{key}={value}" for key, value in dict(argument.split("=", 1) for argument in arguments).items()]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def epoch_records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "epochs.jsonl").read_text().splitlines()]


def comparable(checkpoint: dict) -> dict:
    """Return a checkpoint without entries that depend on the clock."""
    kept = {name: value for name, value in checkpoint.items() if name not in VARIED}
    kept["progress"] = {**checkpoint["progress"], "seconds": None}
    kept["rng"] = [
        {"state": own["state"], "epoch": own["meters"]["epoch"], "CE": own["meters"]["train"]["CE"]}
        for own in checkpoint["rng"]
    ]
    return kept


def assert_same(left, right, path: str = "") -> None:
    """Assert that two nested states are equal bit for bit."""
    assert type(left) is type(right), path
    if isinstance(left, dict):
        assert list(left) == list(right), path
        for key in left:
            assert_same(left[key], right[key], f"{path}.{key}")
    elif isinstance(left, (list, tuple)):
        assert len(left) == len(right), path
        for index, pair in enumerate(zip(left, right, strict=True)):
            assert_same(*pair, f"{path}.{index}")
    elif isinstance(left, torch.Tensor):
        assert torch.equal(left, right), path
    else:
        assert left == right, path
