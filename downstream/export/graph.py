"""A whole model as one graph: the image as it is in, normalised and padded inside, what is found out."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.export.portable import Form, portable
from model.export.scan import DirectionalScan

from .detectors import MaskRCNN, OneStage
from .segmentors import Segmentor

__all__ = ["Graph", "as_graph"]

HEADS = {"RetinaNet": OneStage, "SingleStageDetector": OneStage, "MaskRCNN": MaskRCNN, "EncoderDecoder": Segmentor}


class Graph(nn.Module):
    """A model of mmdet or mmseg: image (1, H, W, 3), uint8, RGB -> what its heads give.

    Boxes are in pixels of the image: left, top, right, bottom.

    Args:
        pixels: Normalises and pads.
        backbone: The stages, in portable form.
        out_indices: Which of their outputs the neck takes.
        neck: Between backbone and heads.
        heads: One of `HEADS`.
    """

    def __init__(
        self, pixels: nn.Module, backbone: nn.Module, out_indices: tuple[int, ...], neck: nn.Module, heads: Any
    ) -> None:
        super().__init__()
        self.pixels = pixels
        self.stages = backbone.stages[: max(out_indices) + 1]
        self.out_indices = out_indices
        self.neck = neck
        self.heads = heads

    @property
    def outputs(self) -> dict[str, tuple[str, ...]]:
        """What is found: its name, and the names of its dimensions, empty where they are fixed."""
        return self.heads.outputs

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        size = torch._shape_as_tensor(image)[1:3]
        x = self.pixels(image)
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        features = self.neck([maps[index] for index in self.out_indices])
        return self.heads(features, size)


class _Pixels(nn.Module):
    """An image (1, H, W, 3), uint8, RGB, as a network takes it: (1, 3, H', W'), padded to a multiple of the divisor."""

    def __init__(self, preprocessor: Any) -> None:
        super().__init__()
        self.register_buffer("mean", preprocessor.mean.view(1, 3, 1, 1).clone())
        self.register_buffer("std", preprocessor.std.view(1, 3, 1, 1).clone())
        # OpenMMLab reads images as BGR.
        self.takes_rgb = preprocessor._channel_conversion
        test = getattr(preprocessor, "test_cfg", None) or {}
        self.divisor = int(getattr(preprocessor, "pad_size_divisor", test.get("size_divisor", 1)))
        self.fill = float(getattr(preprocessor, "pad_value", 0))

    def forward(self, image: Tensor) -> Tensor:
        x = image.permute(0, 3, 1, 2).float()
        if not self.takes_rgb:
            x = x.flip(1)
        x = (x - self.mean) / self.std
        if self.divisor == 1:
            return x
        height, width = x.shape[-2:]
        return F.pad(x, (0, -width % self.divisor, 0, -height % self.divisor), value=self.fill)


def as_graph(model: Any, size: tuple[int, int], *, is_exact: bool) -> Graph:
    """Return a model of OpenMMLab as a graph; neck and heads are the model's own.

    Args:
        model: Detector or segmentor with our backbone, in evaluation mode, on a CPU.
        size: Height and width of the images, or of the largest, in pixels.
        is_exact: Whether all images are of that size.

    Raises:
        ValueError: Its kind, its head or what its test_cfg asks for is not supported.
    """
    kind = type(model).__name__
    if kind not in HEADS:
        raise ValueError(f"{kind} cannot be exported; these can: {', '.join(HEADS)}")
    _check_settings(model)
    pixels = _Pixels(model.data_preprocessor)
    height, width = (-(-side // pixels.divisor) * pixels.divisor for side in size)
    backbone = portable(model.backbone, Form(), (height, width) if is_exact else None)
    for scan in () if is_exact else backbone.modules():
        if isinstance(scan, DirectionalScan):
            scan.use_doublings((-(-height // 16), -(-width // 16)))  # the first stage's maps, the largest
    neck = model.neck if model.with_neck else nn.Identity()
    return Graph(pixels, backbone, model.backbone.out_indices, neck, HEADS[kind](model)).eval()


def _check_settings(model: Any) -> None:
    """Refuse what the heads here do not do, although models of these kinds may ask for it."""
    mode = (model.test_cfg or {}).get("mode", "whole")
    if mode != "whole":
        raise ValueError(f"model.test_cfg.mode={mode} cuts images into windows: set it to whole")
    if getattr(model, "out_channels", None) == 1:
        raise ValueError("a segmentor with one output channel cannot be exported: give it two classes")
    heads = [head for head in (getattr(model, name, None) for name in ("rpn_head", "bbox_head")) if head is not None]
    for head in heads:
        if not hasattr(head, "prior_generator") or not hasattr(head.bbox_coder, "stds"):
            raise ValueError(f"{type(head).__name__} cannot be exported: it has no anchors with DeltaXYWHBBoxCoder")
    for config in [head.test_cfg for head in (*heads, getattr(model, "roi_head", None)) if head is not None]:
        if config.nms.get("type", "nms") != "nms" or config.nms.get("class_agnostic"):
            raise ValueError(
                f"test_cfg.nms={dict(config.nms)} cannot be exported: give type nms and iou_threshold alone"
            )
