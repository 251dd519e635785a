"""Tests a checkpoint of a detector, segmentor or classifier by its configuration."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from mmengine.config import Config, ConfigDict

from .arguments import parse_run, run_parser
from .datasets import check_datasets
from .errors import InputError, exit_code_of
from .processes import build_runner, leave_processes, log_once, prepare_processes
from .settings import check_local, load_run

__all__ = ["main"]

DUMPS = (".pkl", ".pickle")
DUMPERS = {"mmdet": "DumpDetResults", "mmpretrain": "DumpResults"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Test; the exit code is 0, or 2 for bad input."""
    parser = run_parser("Test a checkpoint of a detector, segmentor or classifier.")
    parser.add_argument("checkpoint", help="a checkpoint of training, or a released one")
    parser.add_argument("--tta", action="store_true", help="test at several scales and flipped, and merge the answers")
    parser.add_argument(
        "--out", metavar="PATH", help="keep the predictions: detections in a .pkl file, segmentations in a folder"
    )
    parsed = parse_run(parser, arguments)
    return exit_code_of(lambda: test(parsed))


def test(parsed: argparse.Namespace) -> None:
    """Test as the arguments say.

    Raises:
        InputError: Something is missing, misspelt or does not fit.
    """
    config = load_run(parsed)
    config.load_from, config.resume = parsed.checkpoint, False
    check_local(parsed.checkpoint)
    check_datasets(config, "test")
    if parsed.tta:
        _augment(config)
    if parsed.out:
        _keep(config, parsed.out)
    prepare_processes(config, parsed.launcher)
    _run(config)
    leave_processes()


def _run(config: Config) -> None:
    # By itself: `leave_processes` needs the runner to be let go.
    runner = build_runner(config)
    log_once(runner.hooks)
    runner.test()


def _augment(config: Config) -> None:
    if "tta_model" not in config or "tta_pipeline" not in config:
        raise InputError(f"--tta: {config.filename} does not say how; it has no tta_model and tta_pipeline")
    config.model = ConfigDict(**config.tta_model, module=config.model)
    config.test_dataloader.dataset.pipeline = config.tta_pipeline


def _keep(config: Config, out: str) -> None:
    """Add what keeps the predictions, each package's own."""
    dumper = DUMPERS.get(config.get("default_scope", "mmengine"))
    if dumper is None:
        Path(out).mkdir(parents=True, exist_ok=True)  # mmseg's first process makes it, maybe after another has written
        config.test_evaluator.output_dir = out
        return
    if not out.endswith(DUMPS):
        raise InputError(f"--out {out}: such predictions go to one file, whose name ends in {' or '.join(DUMPS)}")
    evaluators = config.test_evaluator
    evaluators = evaluators if isinstance(evaluators, list) else [evaluators]
    config.test_evaluator = [*evaluators, ConfigDict(type=dumper, out_file_path=out)]
