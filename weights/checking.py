"""The command ``python -m weights.check``: its arguments, and its way from checkpoint to checkpoint."""

from __future__ import annotations

import argparse
import logging
import os
import platform
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from model.zoo import Entry, fetch, models_of, read_zoo
from trainer.run_folder import make_run_folder
from util.distributed import Process, init_process
from util.errors import EXIT_FAILED, EXIT_USER_ERROR, RunError, exit_code_of
from util.launch import Launch, find_launch
from util.logging import setup_console

from .classifiers import check_classifier
from .detectors import Downstream, check_downstream
from .download import add_zoo_options
from .report import screen, write
from .results import FAIL, Result

__all__ = ["check"]

logger = logging.getLogger(__name__)

EPILOG = """\
examples:
  python -m weights.check mobilemamba_t2 --data /data/imagenet
  torchrun --nproc_per_node=8 -m weights.check imagenet --data /data/imagenet
  python -m torch.distributed.launch --use_env --nproc_per_node=8 -m weights.check imagenet --data /data/imagenet
  python -m weights.check maskrcnn fpn --gpus 4 --coco /data/coco --ade20k /data/ADEChallengeData2016

Missing checkpoints are downloaded first. The report goes to the screen and to check.md and check.json in its own
folder. Figures of another validation set, or of a subset, are reported as such and get no verdict.

Exit codes: 0 no figure failed, 1 one did, 2 bad input or a checkpoint that could not be measured, 128 + signal number
when stopped.
"""


def check(arguments: Sequence[str] | None = None) -> int:
    """Check what the command line names; return the exit code."""
    parsed = _parse(arguments)
    return exit_code_of(find_launch, lambda launch: _run(parsed, launch))


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m weights.check",
        description="Measure released checkpoints and compare the published figures.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "names",
        nargs="+",
        metavar="NAME | path.key=value",
        help="a checkpoint, or: imagenet, det, seg, all; with '=' in it, an override of a classifier's config",
    )
    parser.add_argument("--data", metavar="FOLDER", help="ImageNet, with val/ in it (default: that of the config)")
    parser.add_argument("--coco", metavar="FOLDER", help="COCO 2017 (default: that of the config)")
    parser.add_argument("--ade20k", metavar="FOLDER", help="ADEChallengeData2016 (default: that of the config)")
    parser.add_argument(
        "--gpus", type=int, metavar="N", help="processes for detection and segmentation, 0: CPU (default: all GPUs)"
    )
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto", help="for the classifiers")
    parser.add_argument("--tolerance", type=float, metavar="POINTS", help="instead of the data set's own")
    parser.add_argument("--results", default="runs/check", metavar="FOLDER", help="where the report's folder goes")
    add_zoo_options(parser)
    parsed = parser.parse_intermixed_args(arguments)
    parsed.overrides = [word for word in parsed.names if "=" in word]
    parsed.names = [word for word in parsed.names if "=" not in word]
    if not parsed.names:
        parser.error("name a checkpoint, or: imagenet, det, seg, all")
    return parsed


def _run(parsed: argparse.Namespace, launch: Launch) -> int:
    setup_console(is_logging=launch.is_logging, rank=launch.rank)
    entries = models_of(parsed.names, read_zoo(parsed.zoo) if parsed.zoo else read_zoo())
    others = [entry.name for entry in entries if entry.task != "imagenet"]
    if others and launch.world_size > 1:
        raise ValueError(
            f"{', '.join(others)}: detectors and segmentors start their own processes; check them with plain "
            "`python -m weights.check ... --gpus N`, and only the classifiers under a launcher"
        )
    with init_process(launch, device=parsed.device) as process:
        folder = Path(process.on_first(lambda: _make_folder(parsed.results)))
        return _Check(parsed, process, folder).run(entries)


def _make_folder(results: str) -> str:
    try:
        return str(make_run_folder(results, "check"))
    except OSError as error:
        cause = os.strerror(error.errno) if error.errno else error
        raise OSError(f"{results} cannot be written to ({cause}): name another folder with --results") from error


class _Check:
    """Measures one checkpoint after the other and keeps the report up to date."""

    def __init__(self, parsed: argparse.Namespace, process: Process, folder: Path) -> None:
        self.parsed = parsed
        self.process = process
        self.folder = folder
        self.results: list[Result] = []
        self.errors: list[str] = []

    def run(self, entries: Sequence[Entry]) -> int:
        """Measure the checkpoints; return the exit code."""
        exit_code = 0
        for entry in entries:
            checkpoint = self._fetch(entry)
            if checkpoint is not None and entry.task == "imagenet":
                results, exit_code = self._measure_classifier(entry, checkpoint)
                self.results += results
            elif checkpoint is not None:
                self.results += self._measure_downstream(entry, checkpoint)
            if self.process.is_logging:
                write(self.folder, self.results, errors=self.errors, run=self._facts(entries))
            if exit_code:
                break
        self._say()
        if exit_code or self.errors:
            return exit_code or EXIT_USER_ERROR
        return EXIT_FAILED if any(result.verdict == FAIL for result in self.results) else 0

    def _fetch(self, entry: Entry) -> Path | None:
        """Return the checkpoint's verified file; a failure is noted, and the others are still measured."""
        try:
            path = Path(self.process.on_first(lambda: str(fetch(entry, source=self.parsed.source))))
        except (ValueError, OSError) as error:
            self._note(entry, error)
            return None
        return path if path.exists() else fetch(entry, source=self.parsed.source)  # another node, another disk

    def _measure_classifier(self, entry: Entry, checkpoint: Path) -> tuple[list[Result], int]:
        root = [f"data.root={self.parsed.data}"] if self.parsed.data else []
        overrides = [*root, *self.parsed.overrides]
        return check_classifier(entry, checkpoint, self.process, overrides=overrides, tolerance=self.parsed.tolerance)

    def _measure_downstream(self, entry: Entry, checkpoint: Path) -> list[Result]:
        root = self.parsed.coco if entry.task == "det" else self.parsed.ade20k
        options = Downstream(num_gpus=self.parsed.gpus, root=root, work_dir=self.folder / entry.name)
        try:
            return [check_downstream(entry, checkpoint, options, tolerance=self.parsed.tolerance)]
        except (ValueError, OSError, RunError) as error:
            self._note(entry, error)
            return []

    def _note(self, entry: Entry, error: Exception) -> None:
        self.errors.append(f"{entry.name}: {error}")
        logger.error("%s", self.errors[-1])

    def _facts(self, entries: Sequence[Entry]) -> dict[str, Any]:
        device = self.process.device
        return {
            "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "checkpoints": [entry.name for entry in entries],
            "processes": self.process.world_size,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
            "torch": torch.__version__,
            "python": platform.python_version(),
        }

    def _say(self) -> None:
        if self.results:
            logger.info("published against measured\n%s", screen(self.results))
        if self.process.is_logging:
            logger.info("the report is in %s and %s", self.folder / "check.md", self.folder / "check.json")
