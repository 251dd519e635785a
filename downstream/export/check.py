"""A file's answers beside the model's: the same boxes, masks or labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from mmengine.structures import BaseDataElement
from numpy.typing import NDArray
from torch import nn

__all__ = ["Agreement", "compare_detections", "compare_labels", "predict"]

MAX_DISTANCE = 0.5  # pixels, of any side of a box
MIN_SHARE = 0.999  # of pixels with the same label, or on the same side of a mask
MARGIN = 1e-3  # boxes with scores this close to the lowest that counts may be in one answer alone


@dataclass(frozen=True, kw_only=True, slots=True)
class Agreement:
    """How two answers for an image compare.

    Attributes:
        agrees: Whether they are the same, up to rounding.
        summary: In numbers.
    """

    agrees: bool
    summary: str


def predict(model: nn.Module, image: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
    """Return what a model of OpenMMLab itself finds in an image (H, W, 3), RGB, by the names of the exported file."""
    height, width = image.shape[:2]
    sizes = dict.fromkeys(("img_shape", "ori_shape", "pad_shape", "batch_input_shape"), (height, width))
    sample = BaseDataElement(metainfo={**sizes, "scale_factor": (1.0, 1.0)})
    bgr = torch.from_numpy(np.ascontiguousarray(image[..., ::-1].transpose(2, 0, 1)))
    with torch.no_grad():
        (found,) = model.test_step({"inputs": [bgr], "data_samples": [sample]})
    if "pred_sem_seg" in found:
        return {"labels": found.pred_sem_seg.data.numpy()}
    instances = found.pred_instances
    answer = {"boxes": instances.bboxes, "scores": instances.scores, "labels": instances.labels}
    if "masks" in instances:
        answer["masks"] = instances.masks
    return {name: values.numpy() for name, values in answer.items()}


def compare_labels(found: dict[str, NDArray[Any]], expected: dict[str, NDArray[Any]]) -> Agreement:
    """Compare label maps (1, H, W): the same at `MIN_SHARE` of the pixels."""
    share = float((found["labels"] == expected["labels"]).mean())
    return Agreement(agrees=share >= MIN_SHARE, summary=f"the same label at {100 * share:.3f}% of pixels")


def compare_detections(
    found: dict[str, NDArray[Any]], expected: dict[str, NDArray[Any]], *, limit: int, threshold: float
) -> Agreement:
    """Compare boxes of the same class: each has one within `MAX_DISTANCE`, and their masks are the same.

    Args:
        found: ``boxes`` (N, 4), ``scores`` (N), ``labels`` (N) and maybe ``masks`` (N, H, W), highest score first.
        expected: The same.
        limit: The largest number of boxes.
        threshold: The lowest score.
    """
    pairs = _pairs(found, expected)
    alone = [
        score
        for answer, places in ((found, [i for i, _ in pairs]), (expected, [j for _, j in pairs]))
        for score in np.delete(answer["scores"], places)
        if score > _lowest(answer, limit, threshold) + MARGIN
    ]
    distance = max((_distance(found["boxes"][i], expected["boxes"][j]) for i, j in pairs), default=0.0)
    error = max((abs(float(found["scores"][i] - expected["scores"][j])) for i, j in pairs), default=0.0)
    summary = f"{len(expected['boxes'])} boxes: farthest {distance:.1e} pixels, scores within {error:.1e}"
    agrees = not alone
    if alone:
        summary += f", {len(alone)} in one answer alone (score {max(alone):.3f})"
    if "masks" in expected:
        same = [float((found["masks"][i] == expected["masks"][j]).mean()) for i, j in pairs]
        share = min(same, default=1.0)
        agrees = agrees and share >= MIN_SHARE
        summary += f", masks the same at {100 * share:.3f}% of pixels"
    return Agreement(agrees=agrees, summary=summary)


def _pairs(found: dict[str, NDArray[Any]], expected: dict[str, NDArray[Any]]) -> list[tuple[int, int]]:
    """Return places of boxes in both answers that are the same: each, by score, with the nearest one still free."""
    free = set(range(len(expected["boxes"])))
    pairs = []
    for i, (box, label) in enumerate(zip(found["boxes"], found["labels"], strict=True)):
        distances = {j: _distance(box, expected["boxes"][j]) for j in free if expected["labels"][j] == label}
        nearest = min(distances, key=distances.__getitem__, default=None)
        if nearest is not None and distances[nearest] <= MAX_DISTANCE:
            free.remove(nearest)
            pairs.append((i, nearest))
    return pairs


def _distance(box: NDArray[Any], other: NDArray[Any]) -> float:
    return float(np.abs(box - other).max())


def _lowest(answer: dict[str, NDArray[Any]], limit: int, threshold: float) -> float:
    """Return the score from which boxes are surely in an answer."""
    scores = answer["scores"]
    return float(scores.min()) if len(scores) == limit else threshold
