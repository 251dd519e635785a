"""Running the tools as users do, on the synthetic data, with the seven configurations made tiny."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
DOWNSTREAM = REPOSITORY / "downstream"

DETECTORS = {
    "maskrcnn": "configs/mask_rcnn/mask-rcnn_mobilemamba_b1_fpn_1x_coco.py",
    "retinanet": "configs/retinanet/retinanet_mobilemamba_b1_fpn_1x_coco.py",
    "ssdlite": "configs/ssd/ssdlite_mobilemamba_b1_8gpu_2lr_coco.py",
    "ssdlite_512": "configs/ssd/ssdlite_mobilemamba_b1_8gpu_2lr_512_coco.py",
}
SEGMENTORS = {
    "fpn": "configs/sem_fpn/fpn_mobilemamba_b4-160k_ade20k-512x512.py",
    "deeplabv3": "configs/deeplabv3/deeplabv3_mobilemamba_b4-80k_ade20k-512x512.py",
    "pspnet": "configs/pspnet/pspnet_mobilemamba_b4-80k_ade20k-512x512.py",
}
CONFIGS = {**DETECTORS, **SEGMENTORS}


def task_of(name):
    return "det" if name in DETECTORS else "seg"


def scaled(size, *, loaders=("train_dataloader", "val_dataloader", "test_dataloader"), name):
    """Options that let a configuration's pipelines work at another size."""
    from mmengine.config import Config

    config = Config.fromfile(DOWNSTREAM / task_of(name) / CONFIGS[name])
    options = {}
    for loader in loaders:
        entry, dataset = f"{loader}.dataset", config[loader].dataset
        while "dataset" in dataset:
            entry, dataset = f"{entry}.dataset", dataset.dataset
        for index, step in enumerate(dataset.pipeline):
            for key in ("scale", "crop_size"):
                if key in step:
                    options[f"{entry}.pipeline.{index}.{key}"] = f"({size},{size})"
    if "size" in config.model.data_preprocessor:
        options["model.data_preprocessor.size"] = f"({size},{size})"
    return options


def tiny(name, *, size=96, images=2):
    """Options for a few steps on a CPU: random weights, small images, small batches, no worker processes."""
    options = scaled(size, name=name)
    for loader in ("train_dataloader", "val_dataloader", "test_dataloader"):
        options |= {f"{loader}.num_workers": 0, f"{loader}.persistent_workers": False}
    options |= {"train_dataloader.batch_size": images, "model.backbone.pretrained": False}
    options |= {"default_hooks.logger.interval": 1, "randomness.seed": 0}
    if name in SEGMENTORS:
        options |= {"train_cfg.max_iters": 2, "train_cfg.val_interval": 2, "default_hooks.checkpoint.interval": 2}
    else:
        options |= {"train_cfg.max_epochs": 1, "train_cfg.val_interval": 1}
    if name.startswith("ssdlite"):
        options["train_dataloader.dataset.times"] = 1
    if name in DETECTORS:  # so that there is something to evaluate after so few steps
        options["model.test_cfg.rcnn.score_thr" if name == "maskrcnn" else "model.test_cfg.score_thr"] = 0.0
    return options


def arguments_of(options):
    return ["--cfg-options", *(f"{key}={value}" for key, value in options.items())]


def run_script(task, script, *arguments, env=None, timeout=600):
    """Run ``./tools/<script>`` in the task's folder, on the CPU."""
    variables = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [f"./tools/{script}", *map(str, arguments)],
        cwd=DOWNSTREAM / task,
        env=variables | (env or {}),
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def run_python(task, script, *arguments, **more):
    """Run ``python tools/<script>`` likewise."""
    variables = {**os.environ, "PYTHONPATH": str(REPOSITORY), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, f"tools/{script}", *map(str, arguments)],
        cwd=DOWNSTREAM / task,
        env=variables,
        capture_output=True,
        text=True,
        timeout=600,
        **more,
    )


def scalars(work_dir):
    """The training records of the last run in a work folder: one mapping a logged iteration."""
    path = sorted(work_dir.glob("*/vis_data/scalars.json"))[-1]
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return [record for record in records if "lr" in record]


def metrics(work_dir):
    """The evaluators' figures of the last test in a work folder."""
    paths = [path for path in sorted(work_dir.glob("*/*.json")) if path.stem == path.parent.name]
    return json.loads(paths[-1].read_text())
