"""What mmdet does with the outputs of a detector's heads, written as operators that ONNX has, for one image.

N boxes or candidates, K classes, A anchors a place, C channels, H height, W width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .operators import crop_regions, suppress, take_highest

__all__ = ["MaskRCNN", "OneStage"]

SMALLEST_RATIO = 16 / 1000  # of a box's side to its anchor's; mmdet's wh_ratio_clip


class OneStage(nn.Module):
    """RetinaNet or SSD: features -> boxes (N, 4), scores (N), labels (N), highest score first.

    Args:
        detector: mmdet's, with a `bbox_head` of anchors.
    """

    outputs = {"boxes": ("detections", ""), "scores": ("detections",), "labels": ("detections",)}  # noqa: RUF012

    def __init__(self, detector: Any) -> None:
        super().__init__()
        self.head = detector.bbox_head
        self.config = self.head.test_cfg
        self.anchors = _Anchors(self.head.prior_generator)
        self.decode = _Decode(self.head.bbox_coder)

    def forward(self, features: Sequence[Tensor], size: Tensor) -> tuple[Tensor, ...]:
        logits, deltas = self.head(features)
        levels = zip(logits, deltas, self.anchors(logits), strict=True)
        candidates = [self._candidates(*level, size) for level in levels]
        boxes, scores, labels = (torch.cat(parts) for parts in zip(*candidates, strict=True))
        kept = _suppress_by_group(boxes, scores, labels, size, self.config)
        return boxes[kept], scores[kept], labels[kept]

    def _candidates(self, logits: Tensor, deltas: Tensor, anchors: Tensor, size: Tensor) -> tuple[Tensor, ...]:
        """Return boxes, scores and labels of the highest scores of a level, over all places and classes."""
        logits = _rows(logits, self.head.cls_out_channels)
        scores = logits.sigmoid() if self.head.use_sigmoid_cls else logits.softmax(-1)[:, :-1]
        scores, places = take_highest(scores.flatten(), self.config.nms_pre)
        anchor, label = places // self.head.num_classes, places % self.head.num_classes
        boxes = self.decode(anchors[anchor], _rows(deltas, 4)[anchor], size)
        return boxes, _without_empty(boxes, scores), label


class MaskRCNN(nn.Module):
    """Mask R-CNN: features -> boxes (N, 4), scores (N), labels (N), masks (N, H, W), highest score first.

    Args:
        detector: mmdet's.
    """

    outputs = {**OneStage.outputs, "masks": ("detections", "height", "width")}  # noqa: RUF012

    def __init__(self, detector: Any) -> None:
        super().__init__()
        self.proposals = _Proposals(detector.rpn_head)
        heads = detector.roi_head
        self.config = heads.test_cfg
        self.box_head, self.mask_head = heads.bbox_head, heads.mask_head
        self.decode = _Decode(self.box_head.bbox_coder)
        self.box_regions = _Regions(heads.bbox_roi_extractor)
        self.mask_regions = _Regions(heads.mask_roi_extractor)

    def forward(self, features: Sequence[Tensor], size: Tensor) -> tuple[Tensor, ...]:
        proposals = self.proposals(features, size)
        logits, deltas = self.box_head(self.box_regions(features, proposals))
        boxes, scores, labels = self._select(proposals, logits, deltas, size)
        logits = self.mask_head(self.mask_regions(features, boxes))
        masks = logits.gather(1, labels[:, None, None, None].expand(-1, -1, *logits.shape[2:]))[:, 0].sigmoid()
        return boxes, scores, labels, _paste(masks, boxes, size) >= self.config.mask_thr_binary

    def _select(self, proposals: Tensor, logits: Tensor, deltas: Tensor, size: Tensor) -> tuple[Tensor, ...]:
        """Return boxes, scores and labels: each proposal is a candidate for each class, with a box for it."""
        scores = logits.softmax(-1)[:, :-1]
        labels = torch.arange(self.box_head.num_classes).expand_as(scores).flatten()
        scores = scores.flatten()
        proposals = proposals[:, None].expand(-1, self.box_head.num_classes, -1).reshape(-1, 4)
        boxes = self.decode(proposals, deltas.reshape(-1, 4), size)
        kept = _suppress_by_group(boxes, scores, labels, size, self.config)
        return boxes[kept], scores[kept], labels[kept]


class _Proposals(nn.Module):
    """A proposal network: features -> boxes (N, 4) that may hold something."""

    def __init__(self, head: Any) -> None:
        super().__init__()
        self.head = head
        self.config = head.test_cfg
        self.anchors = _Anchors(head.prior_generator)
        self.decode = _Decode(head.bbox_coder)

    def forward(self, features: Sequence[Tensor], size: Tensor) -> Tensor:
        logits, deltas = self.head(features)
        boxes, scores, levels = [], [], []
        for level, (logit, delta, anchors) in enumerate(zip(logits, deltas, self.anchors(logits), strict=True)):
            score, anchor = take_highest(_rows(logit, 1)[:, 0].sigmoid(), self.config.nms_pre)
            box = self.decode(anchors[anchor], _rows(delta, 4)[anchor], size)
            boxes.append(box)
            scores.append(_without_empty(box, score))
            levels.append(torch.full_like(anchor, level))
        all_boxes = torch.cat(boxes)
        kept = _suppress_by_group(all_boxes, torch.cat(scores), torch.cat(levels), size, self.config)
        return all_boxes[kept]


class _Anchors(nn.Module):
    """Anchors of every level: maps (1, A*..., H, W) -> (H * W * A, 4)."""

    def __init__(self, generator: Any) -> None:
        super().__init__()
        self.strides = generator.strides  # across and down
        for level, anchors in enumerate(generator.base_anchors):
            self.register_buffer(f"level{level}", anchors.clone())

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        levels = []
        for level, (x, (across, down)) in enumerate(zip(maps, self.strides, strict=True)):
            height, width = x.shape[-2:]
            left = (torch.arange(width, dtype=torch.float32) * across).expand(height, width)
            top = (torch.arange(height, dtype=torch.float32) * down)[:, None].expand(height, width)
            shifts = torch.stack((left, top, left, top), dim=-1).reshape(-1, 1, 4)
            levels.append((getattr(self, f"level{level}") + shifts).reshape(-1, 4))
        return levels


class _Decode(nn.Module):
    """Boxes from anchors or proposals (N, 4), what a head says of them (N, 4), and the image's height and width (2)."""

    def __init__(self, coder: Any) -> None:
        super().__init__()
        self.register_buffer("means", torch.tensor(coder.means))
        self.register_buffer("stds", torch.tensor(coder.stds))
        self.largest = abs(math.log(SMALLEST_RATIO))

    def forward(self, anchors: Tensor, deltas: Tensor, size: Tensor) -> Tensor:
        deltas = deltas * self.stds + self.means
        centres = (anchors[:, :2] + anchors[:, 2:]) * 0.5
        extents = anchors[:, 2:] - anchors[:, :2]
        centres = centres + extents * deltas[:, :2]
        halves = extents * deltas[:, 2:].clamp(-self.largest, self.largest).exp() * 0.5
        boxes = torch.cat((centres - halves, centres + halves), dim=-1)
        return torch.minimum(boxes.clamp(min=0), size.flip(0).repeat(2))


class _Regions(nn.Module):
    """The features of every box (N, 4), of the level that its size asks for: (N, C, size, size)."""

    def __init__(self, extractor: Any) -> None:
        super().__init__()
        self.finest_scale = float(extractor.finest_scale)
        self.scales = [layer.spatial_scale for layer in extractor.roi_layers]
        (self.size, _) = extractor.roi_layers[0].output_size

    def forward(self, features: Sequence[Tensor], boxes: Tensor) -> Tensor:
        scales = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).sqrt()
        levels = torch.log2(scales / self.finest_scale + 1e-6).floor().clamp(0, len(self.scales) - 1)
        regions, places = [], []
        for level, (x, scale) in enumerate(zip(features, self.scales, strict=False)):
            own = (levels == level).nonzero()[:, 0]
            places.append(own)
            regions.append(crop_regions(x, boxes[own], size=self.size, scale=scale))
        return torch.cat(regions)[torch.cat(places).argsort()]


def _rows(x: Tensor, width: int) -> Tensor:
    """Return a head's output for one image, (1, A * width, H, W), as a row an anchor: (H * W * A, width)."""
    return x[0].permute(1, 2, 0).reshape(-1, width)


def _without_empty(boxes: Tensor, scores: Tensor) -> Tensor:
    """Return the scores (N), 0 for boxes without area."""
    return scores * (boxes[:, 2:] > boxes[:, :2]).all(-1)


def _suppress_by_group(boxes: Tensor, scores: Tensor, groups: Tensor, size: Tensor, config: Any) -> Tensor:
    """Suppress among boxes of the same class or level: apart from each other they are shifted out of reach."""
    shifts = groups.to(boxes.dtype) * (size.max() + 1)
    return suppress(
        boxes + shifts[:, None],
        scores,
        overlap=float(config.nms.iou_threshold),
        threshold=float(config.get("score_thr", 0.0)),
        limit=int(config.max_per_img),
    )


def _paste(masks: Tensor, boxes: Tensor, size: Tensor) -> Tensor:
    """Return masks (N, h, w) that fill their boxes, at each pixel of the image: (N, H, W), 0 outside.

    Bilinear interpolation is a matrix a side: a pixel is between two of the mask's, or outside.
    """
    height, width = size[0], size[1]
    down = _interpolation(boxes[:, 1], boxes[:, 3], masks.shape[1], height)
    across = _interpolation(boxes[:, 0], boxes[:, 2], masks.shape[2], width)
    return down @ masks @ across.transpose(1, 2)


def _interpolation(start: Tensor, end: Tensor, num_cells: int, num_pixels: Tensor) -> Tensor:
    """Return weights (N, pixels, cells) of the cells between ``start`` and ``end`` (N) at every pixel's centre."""
    pixels = torch.arange(num_pixels, dtype=start.dtype) + 0.5
    share = (pixels - start[:, None]) / (end - start).clamp(min=1e-6)[:, None]
    position = share * num_cells - 0.5
    return (1 - (position[..., None] - torch.arange(num_cells)).abs()).clamp(min=0)
