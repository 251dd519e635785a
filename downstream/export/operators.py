"""Operators that PyTorch has, and ONNX too, but between which the exporter knows no good way.

Each computes in PyTorch, and says for the exporter which nodes of ONNX do the same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torchvision.ops import nms, roi_align

__all__ = ["crop_regions", "suppress", "take_highest"]


def take_highest(x: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    """Return the highest values of ``x`` (N), at most ``limit``, highest first, and their places; N may be any."""
    return _TakeHighest.apply(x, limit)


def suppress(boxes: Tensor, scores: Tensor, *, overlap: float, threshold: float, limit: int) -> Tensor:
    """Return the places of the boxes that no box of a higher score overlaps, highest score first.

    Args:
        boxes: (N, 4), left, top, right, bottom.
        scores: (N).
        overlap: From which intersection over union two boxes exclude each other.
        threshold: Scores up to this one do not count.
        limit: How many boxes to keep.
    """
    return _Suppress.apply(boxes, scores, overlap, threshold, limit)


def crop_regions(x: Tensor, boxes: Tensor, *, size: int, scale: float) -> Tensor:
    """Return a map's mean within every cell of regions: (1, C, H, W) and (N, 4) -> (N, C, size, size).

    Args:
        x: The map.
        boxes: In pixels of the image.
        size: Cells a side of every region.
        scale: The map's pixels a pixel of the image.
    """
    return _CropRegions.apply(x, boxes, size, scale)


class _TakeHighest(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, limit: int) -> tuple[Tensor, Tensor]:
        values, places = torch.topk(x, min(limit, len(x)))
        return values, places

    @staticmethod
    def symbolic(g: Any, x: Any, limit: int) -> Any:
        count = g.op("Min", g.op("Shape", x), g.op("Constant", value_t=torch.tensor([limit])))
        return g.op("TopK", x, count, axis_i=0, outputs=2)


class _Suppress(Function):
    @staticmethod
    def forward(ctx: Any, boxes: Tensor, scores: Tensor, overlap: float, threshold: float, limit: int) -> Tensor:
        places = (scores > threshold).nonzero()[:, 0]
        return places[nms(boxes[places], scores[places], overlap)[:limit]]

    @staticmethod
    def symbolic(g: Any, boxes: Any, scores: Any, overlap: float, threshold: float, limit: int) -> Any:
        def constant(value: Any) -> Any:
            return g.op("Constant", value_t=torch.tensor(value))

        one_image = g.op("Unsqueeze", boxes, constant([0]))
        one_class = g.op("Unsqueeze", scores, constant([0, 1]))
        limits = (constant([limit]), constant([overlap]), constant([threshold]))
        kept = g.op("NonMaxSuppression", one_image, one_class, *limits)  # rows of image, class and place
        return g.op("Gather", kept, constant(2), axis_i=1)


class _CropRegions(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, boxes: Tensor, size: int, scale: float) -> Tensor:
        return roi_align(x, [boxes], size, scale, aligned=True)

    @staticmethod
    def symbolic(g: Any, x: Any, boxes: Any, size: int, scale: float) -> Any:
        count = g.op("Gather", g.op("Shape", boxes), g.op("Constant", value_t=torch.tensor([0])), axis_i=0)
        images = g.op("ConstantOfShape", count, value_t=torch.tensor([0]))  # all of the first
        return g.op(
            "RoiAlign",
            x,
            boxes,
            images,
            coordinate_transformation_mode_s="half_pixel",
            output_height_i=size,
            output_width_i=size,
            sampling_ratio_i=0,  # as many samples as a cell has pixels
            spatial_scale_f=scale,
        )
