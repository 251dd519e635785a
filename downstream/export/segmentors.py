"""A segmentor's head up to the label of every pixel, written as operators that ONNX has."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Segmentor"]


class Segmentor(nn.Module):
    """Features -> labels (1, H, W) at the image's size.

    Args:
        segmentor: mmseg's.
    """

    outputs = {"labels": ("", "height", "width")}  # noqa: RUF012

    def __init__(self, segmentor: Any) -> None:
        super().__init__()
        self.head = copy.deepcopy(segmentor.decode_head)
        _make_any_size(self.head)

    def forward(self, features: Sequence[Tensor], size: Tensor) -> tuple[Tensor, ...]:
        logits = self.head(features)
        logits = F.interpolate(logits, (size[0], size[1]), mode="bilinear", align_corners=self.head.align_corners)
        return (logits.argmax(1),)


class _AdaptivePool(nn.Module):
    """`nn.AdaptiveAvgPool2d` as a matrix product a side: (B, C, H, W) -> (B, C, size, size).

    Of cells that overlap, as they do where the sides are no multiples of the size, ONNX has no pooling.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        down, across = (self._means(side) for side in x.shape[-2:])
        return down @ x @ across.T

    def _means(self, num_pixels: int) -> Tensor:
        """Return the matrix (size, pixels) that takes the mean of every cell's pixels."""
        cell, pixel = torch.arange(self.size)[:, None], torch.arange(num_pixels)
        start = cell * num_pixels // self.size
        end = ((cell + 1) * num_pixels + self.size - 1) // self.size
        is_inside = ((pixel >= start) & (pixel < end)).float()
        return is_inside / is_inside.sum(1, keepdim=True)


class _Upsample(nn.Module):
    """Mmseg's Upsample, which fixes its size when it is traced: (B, C, H, W) -> (B, C, scale H, scale W)."""

    def __init__(self, upsample: Any) -> None:
        super().__init__()
        self.scale = int(upsample.scale_factor)
        self.options = {"mode": upsample.mode, "align_corners": upsample.align_corners}

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(x, [side * self.scale for side in x.shape[-2:]], **self.options)


def _make_any_size(module: nn.Module) -> None:
    """Replace the layers that are exported for one size alone."""
    for name, child in module.named_children():
        if isinstance(child, nn.AdaptiveAvgPool2d):
            size = child.output_size
            setattr(module, name, _AdaptivePool(size if isinstance(size, int) else size[0]))
        elif type(child).__name__ == "Upsample" and getattr(child, "scale_factor", None):
            setattr(module, name, _Upsample(child))
        else:
            _make_any_size(child)
