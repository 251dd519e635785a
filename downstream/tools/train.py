"""Trains a detector, segmentor or classifier by its configuration."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from mmengine.config import Config

from .arguments import parse_run, run_parser
from .datasets import check_datasets
from .errors import InputError, exit_code_of
from .processes import build_runner, leave_processes, prepare_processes
from .settings import check_local, load_run

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Train; the exit code is 0, or 2 for bad input."""
    parser = run_parser("Train a detector, segmentor or classifier.")
    parser.add_argument("--amp", action="store_true", help="train in mixed precision (needs a GPU)")
    parser.add_argument(
        "--auto-scale-lr", action="store_true", help="scale the learning rate to this number of processes and images"
    )
    parser.add_argument(
        "--resume", nargs="?", const="auto", metavar="CHECKPOINT", help="resume from it, or from the work folder's last"
    )
    parsed = parse_run(parser, arguments)
    return exit_code_of(lambda: train(parsed))


def train(parsed: argparse.Namespace) -> None:
    """Train as the arguments say.

    Raises:
        InputError: Something is missing, misspelt or does not fit.
    """
    config = load_run(parsed)
    if parsed.amp:
        _mix_precision(config)
    if parsed.auto_scale_lr:
        _scale_learning_rate(config)
    if parsed.resume:
        config.resume = True
        config.load_from = _last_checkpoint(Path(config.work_dir)) if parsed.resume == "auto" else parsed.resume
    check_local(config.load_from)
    check_datasets(config, "train", "val")
    prepare_processes(config, parsed.launcher)
    build_runner(config).train()
    leave_processes()


def _last_checkpoint(work_dir: Path) -> str | None:
    """Return the last checkpoint of a work folder, which may have been copied; None where it has none.

    mmengine notes where the file was written, which after copying is in another folder.
    """
    note = work_dir / "last_checkpoint"
    if not note.is_file():
        return None
    written = Path(note.read_text(encoding="utf-8").strip())
    beside = work_dir / written.name
    if beside.is_file():
        return str(beside)
    if not written.is_file():
        raise InputError(
            f"--resume: {work_dir} has no {written.name}, which its last_checkpoint names; give a checkpoint"
        )
    return str(written)


def _mix_precision(config: Config) -> None:
    if not torch.cuda.is_available():
        raise InputError("--amp needs a GPU, and PyTorch finds none: leave it out")
    config.optim_wrapper.type = "AmpOptimWrapper"
    config.optim_wrapper.loss_scale = "dynamic"


def _scale_learning_rate(config: Config) -> None:
    if not (config.get("auto_scale_lr") or {}).get("base_batch_size"):
        raise InputError(
            "--auto-scale-lr: the configuration does not say for how many images a step its learning rate is; set "
            "--cfg-options auto_scale_lr.base_batch_size=16"
        )
    config.auto_scale_lr.enable = True
