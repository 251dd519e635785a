"""Runs a detector, a segmentor or a classifier on one image and writes a picture of what it finds."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mmcv
import torch
from mmengine.config import Config
from mmengine.dataset import Compose, pseudo_collate
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, VISUALIZERS, init_default_scope
from torch import nn

from downstream.hooks import check_fit
from downstream.loading import load_local_checkpoint
from util.cores import count_cores, limit_threads

from .arguments import add_options
from .datasets import classes_of
from .errors import InputError, exit_code_of
from .settings import check_local, load_config, loader_datasets, registered

__all__ = ["build_network", "class_names", "main"]

NUM_SHOWN = 5  # classes of a classifier


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw; the exit code is 0, or 2 for bad input."""
    parser = argparse.ArgumentParser(
        description="Draw the boxes, masks, segmentation or classes that a model finds in an image."
    )
    parser.add_argument("image", help="the image")
    parser.add_argument("config", help="a config file, with or without .py")
    parser.add_argument("checkpoint", help="a checkpoint of training, or a released one")
    parser.add_argument("--out", default="prediction.jpg", metavar="FILE", help="the picture (prediction.jpg)")
    parser.add_argument("--score-thr", type=float, default=0.3, metavar="S", help="detections from this score (0.3)")
    parser.add_argument("--device", help="cpu or cuda:0; a GPU where there is one")
    add_options(parser)
    parsed = parser.parse_args(arguments)
    return exit_code_of(lambda: _draw(parsed))


def build_network(config: Config, *, checkpoint: str | None = None, device: str | None = None) -> nn.Module:
    """Return a configuration's model in evaluation mode.

    Args:
        config: Detector's, segmentor's or classifier's.
        checkpoint: Its weights; None leaves them as they are initialised.
        device: None is a GPU where there is one.

    Raises:
        InputError: The checkpoint cannot be read, or is another model's.
    """
    init_default_scope(config.get("default_scope", "mmengine"))
    network = revert_sync_batchnorm(MODELS.build(config.model))
    if checkpoint is not None:
        check_local(checkpoint)
        read = load_local_checkpoint(checkpoint)
        check_fit(network, read, origin=checkpoint)
        network.load_state_dict(read["state_dict"])
    return network.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()


def _draw(parsed: argparse.Namespace) -> None:
    limit_threads(count_cores())
    image = mmcv.imread(parsed.image, channel_order="rgb") if Path(parsed.image).is_file() else None
    if image is None:
        raise InputError(f"no image at {parsed.image}, or none that can be read")
    config = load_config(parsed.config, parsed.cfg_options, data_root=parsed.data_root)
    network = build_network(config, checkpoint=parsed.checkpoint, device=parsed.device)
    _, dataset = next(loader_datasets(config, "test_dataloader"))
    sample = _predict(network, parsed.image, dataset["pipeline"])
    visualizer = VISUALIZERS.build({"name": "prediction", **config.visualizer, "vis_backends": None})
    scope = config.get("default_scope", "mmengine")
    known = getattr(registered(dataset["type"], scope), "METAINFO", {})
    classes = class_names(config, parsed.checkpoint)
    visualizer.dataset_meta = {**known, **(dataset.get("metainfo") or {}), "classes": classes}
    if "pred_score" in sample:
        visualizer.visualize_cls(image, sample, out_file=parsed.out)
    else:
        threshold = {"pred_score_thr": parsed.score_thr} if "pred_instances" in sample else {}
        visualizer.add_datasample("prediction", image, sample, draw_gt=False, out_file=parsed.out, **threshold)
    print(f"{parsed.out}: {_summary(sample, classes, parsed.score_thr) or 'nothing'}")


def class_names(config: Config, checkpoint: str) -> Sequence[str] | None:
    """Return the names of a model's classes: its test data's, or those noted in the checkpoint; None without either."""
    _, dataset = next(loader_datasets(config, "test_dataloader"))
    own = classes_of(dataset, config.get("default_scope", "mmengine"))
    if own is not None:
        return own
    meta = load_local_checkpoint(checkpoint).get("meta") or {}
    return (meta.get("dataset_meta") or {}).get("classes")


def _predict(network: nn.Module, image: str, pipeline: Sequence[dict[str, Any]]) -> Any:
    steps = Compose([step for step in pipeline if "Annotations" not in step["type"]])
    packed = steps({"img_path": image, "img_id": 0})
    with torch.no_grad():
        (sample,) = network.test_step(pseudo_collate([packed]))
    return sample


def _summary(sample: Any, classes: Sequence[str] | None, threshold: float) -> str:
    def name(label: int) -> str:
        return classes[label] if classes else f"class {label}"

    if "pred_score" in sample:
        scores, labels = sample.pred_score.topk(min(NUM_SHOWN, len(sample.pred_score)))
        pairs = zip(labels.tolist(), scores.tolist(), strict=True)
        return ", ".join(f"{name(label)} {score:.2f}" for label, score in pairs)
    if "pred_instances" in sample:
        found = sample.pred_instances[sample.pred_instances.scores > threshold]
        names = [name(label) for label in found.labels.tolist()]
        return ", ".join(f"{names.count(kind)} {kind}" for kind in sorted(set(names)))
    return ", ".join(sorted(map(name, sample.pred_sem_seg.data.unique().tolist())))
