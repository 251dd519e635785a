"""A detector's or segmentor's published figures checked with the OpenMMLab tools below ``downstream/``."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from downstream.data.layout import ADE20K_FOLDER, ade20k_images, read_coco
from model.zoo import Dataset, Entry
from util.errors import RunError

from .results import Result, judge
from .validation_set import doubt_of_size

__all__ = ["Downstream", "check_downstream"]

logger = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {"det": ("mmengine", "mmcv", "mmdet"), "seg": ("mmengine", "mmcv", "mmseg")}
# COCO's figures under the names of mmdet, which gives shares of 1; mmseg names and gives them as they are published.
COCO_NAMES = {"AP": "mAP", "AP50": "mAP_50", "AP75": "mAP_75", "APs": "mAP_s", "APm": "mAP_m", "APl": "mAP_l"}
# Where mmdet's and mmseg's own configs look, from the folder of the task.
DEFAULT_ROOTS = {"det": "data/coco", "seg": f"data/ade/{ADE20K_FOLDER}"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Downstream:
    """Options of a detector's or segmentor's test.

    Attributes:
        num_gpus: Processes, one for each GPU; 0 for the CPU, None for all GPUs there are.
        root: The data set's folder; that of the config when None.
        work_dir: Where the tool writes.
    """

    num_gpus: int | None
    root: str | None
    work_dir: Path


def check_downstream(entry: Entry, checkpoint: Path, options: Downstream, *, tolerance: float | None) -> Result:
    """Test a checkpoint with the tool of its task and read the metrics that it leaves.

    Args:
        entry: The checkpoint.
        checkpoint: Its file.
        options: How it is tested.
        tolerance: In points; that of the data set when None.

    Raises:
        ValueError: If OpenMMLab is not installed, or the data set is missing.
        RunError: If the tool fails.
    """
    tool = _find_tool(entry)
    folder = tool.parents[1]
    root = _find_root(entry, options.root, folder)
    num_images, num_classes = _count(entry.task, root)
    doubts = _doubts(num_images, num_classes, entry.dataset)
    num_gpus = torch.cuda.device_count() if options.num_gpus is None else options.num_gpus
    arguments = [str(ROOT / entry.config), str(checkpoint.resolve()), str(num_gpus)]
    places = ["--work-dir", str(options.work_dir.resolve()), "--data-root", str(root)]
    start = time.perf_counter()
    _run_tool([str(tool), *arguments, *places], folder=folder)
    seconds = time.perf_counter() - start
    measured = _published_names(entry, _read_metrics(options.work_dir))
    points = entry.dataset.tolerance if tolerance is None else tolerance
    return Result(
        name=entry.name,
        weights="state_dict",
        config=entry.config,
        overrides=[],
        checkpoint=str(checkpoint),
        dataset=entry.dataset.title,
        fingerprint="",
        num_images=num_images,
        seconds=seconds,
        tolerance=points,
        figures=judge(entry, measured, tolerance=points, is_comparable=not doubts),
        doubts=doubts,
    )


def _find_tool(entry: Entry) -> Path:
    absent = [name for name in PACKAGES[entry.task] if importlib.util.find_spec(name) is None]
    if absent:
        raise ValueError(
            f"{entry.name} needs OpenMMLab's {', '.join(absent)}: `make downstream` installs what is missing"
        )
    tool = ROOT / "downstream" / entry.task / "tools" / "dist_test.sh"
    if not tool.is_file():
        raise ValueError(
            f"{entry.name} is tested by {tool}, which is not there: run from a whole copy of the repository"
        )
    return tool


def _find_root(entry: Entry, given: str | None, folder: Path) -> Path:
    root = Path(given).expanduser().resolve() if given else folder / DEFAULT_ROOTS[entry.task]
    if entry.task == "seg" and (root / ADE20K_FOLDER).is_dir():
        root = root / ADE20K_FOLDER
    if not root.is_dir():
        option = "--coco" if entry.task == "det" else "--ade20k"
        raise ValueError(f"{root}: there is no such folder; say where {entry.dataset.title} lies with {option}")
    return root


def _count(task: str, root: Path) -> tuple[int, int | None]:
    """Return the images and classes of the validation set; ADE20K's folders do not say how many classes there are."""
    if task == "seg":
        return len(ade20k_images(root, "validation")), None
    annotations = read_coco(root, "val2017")
    return len(annotations["images"]), len(annotations["categories"])


def _doubts(num_images: int, num_classes: int | None, expected: Dataset) -> list[str]:
    doubts = [doubt_of_size(num_images, expected)]
    if num_classes not in (None, expected.num_classes):
        doubts.append(f"{num_classes} classes, where {expected.title} has {expected.num_classes}")
    return [doubt for doubt in doubts if doubt]


def _run_tool(command: Sequence[str], *, folder: Path) -> None:
    """Run a tool to its end with this interpreter; its output goes where ours goes."""
    logger.info("running %s", shlex.join(command))
    done = subprocess.run(command, cwd=folder, env={**os.environ, "PYTHON": sys.executable}, check=False)
    if done.returncode:
        raise RunError(f"{command[0]} failed with exit code {done.returncode}; its output is above")


def _read_metrics(work_dir: Path) -> dict[str, float]:
    """Return the metrics that mmengine logs at the end of a test, in ``<work_dir>/<time>/<time>.json``."""
    files = [file for file in work_dir.glob("*/*.json") if file.stem == file.parent.name]
    if len(files) != 1:
        raise RunError(
            f"{work_dir} holds {len(files)} files of metrics (<time>/<time>.json), expected the one of this test"
        )
    return json.loads(files[0].read_text(encoding="utf-8"))


def _published_names(entry: Entry, metrics: Mapping[str, float]) -> dict[str, float]:
    """Return the metrics in points, under the names of the published figures."""
    found = {name.rpartition("/")[2]: value for name, value in metrics.items()}
    measured = {}
    for name in entry.published:
        kind, _, figure = name.rpartition("_")
        theirs = f"{kind}_{COCO_NAMES[figure]}" if kind else name
        if theirs not in found:
            raise RunError(f"the test of {entry.name} gave no {theirs}, only {', '.join(found)}")
        measured[name] = 100 * found[theirs] if kind else found[theirs]
    return measured
