"""What the best network gets wrong: its confusion matrix, and pictures of its most confident mistakes."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from data import ImageDataset, UnreadableImageError
from model.files import replacing

from ..evaluate import Answers

__all__ = ["find_mistakes", "mistakes_path", "write_mistakes"]

NUM_PICTURES = 24
SIDE = 112  # pixels, of the longer side of a picture


def mistakes_path(folder: Path, weights: str) -> Path:
    """Return the file in a run's folder about the plain (``net``) or the averaged (``net_E``) weights."""
    return folder / f"mistakes_{weights}.json"


def write_mistakes(path: Path, mistakes: Mapping[str, Any]) -> None:
    """Write what `find_mistakes` found; the file appears only when it is whole.

    Raises:
        OSError: If it cannot be written.
    """
    with replacing(path) as aside:
        aside.write_text(json.dumps(mistakes), encoding="utf-8")


def find_mistakes(answers: Answers, dataset: ImageDataset, names: Sequence[str], *, epoch: int) -> dict[str, Any]:
    """Return the mistakes of a network as plain values.

    Args:
        answers: Those to the whole test set.
        dataset: The test set; the pictures are read from it again.
        names: Name of each class.
        epoch: That of the test, counted from 1.

    Returns:
        ``epoch``, ``classes``, ``confusion``: class, answer and number of images for each pair that there is, and
        ``mistakes``, the most confident first: ``image``, ``class``, ``answer``, ``confidence`` and ``picture``, a data
        URI, empty where the image cannot be read. An answer of -1 was not finite.
    """
    pairs, counts = np.unique(np.stack([answers.targets, answers.predicted]), axis=1, return_counts=True)
    wrong = np.flatnonzero((answers.targets != answers.predicted) & (answers.predicted >= 0))
    order = wrong[np.argsort(-answers.confidence[wrong], kind="stable")][:NUM_PICTURES]
    try:
        mistakes = [_mistake(answers, dataset, int(index)) for index in order]
    finally:
        dataset.close()
    confusion = [[*pair, count] for pair, count in zip(pairs.T.tolist(), counts.tolist(), strict=True)]
    return {"epoch": epoch, "classes": list(names), "confusion": confusion, "mistakes": mistakes}


def _mistake(answers: Answers, dataset: ImageDataset, index: int) -> dict[str, Any]:
    target = int(answers.targets[index])
    return {
        "image": PurePath(dataset.name(index)).name,
        "class": target,
        "answer": int(answers.predicted[index]),
        "confidence": round(float(answers.confidence[index]), 4),
        "picture": _picture(dataset, index, target),
    }


def _picture(dataset: ImageDataset, index: int, target: int) -> str:
    """Return a small picture as a data URI; none where the image at this place is not the one that was tested."""
    try:
        image, label = dataset.load(index)
    except (UnreadableImageError, OSError):
        return ""
    if label != target:
        return ""
    kind = "png" if max(image.size) <= SIDE else "jpeg"
    image = image.convert("RGB")
    image.thumbnail((SIDE, SIDE))
    file = io.BytesIO()
    image.save(file, kind, quality=80)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"
