"""The files of COCO and ADE20K: places, classes, and what they list."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = [
    "ADE20K_CLASSES",
    "ADE20K_FOLDER",
    "ADE20K_SPLITS",
    "COCO_CATEGORIES",
    "COCO_LISTS",
    "COCO_SPLITS",
    "ade20k_images",
    "coco_file",
    "read_coco",
]

# Split -> number of images.
COCO_SPLITS = {"train2017": 118_287, "val2017": 5_000}
ADE20K_SPLITS = {"training": 20_210, "validation": 2_000}

COCO_LISTS = ("images", "annotations", "categories")
ADE20K_FOLDER = "ADEChallengeData2016"
ADE20K_CLASSES = 150  # label 0 is a pixel of no class, 1..150 are the classes

COCO_CATEGORIES = {
    1: "person", 2: "bicycle", 3: "car", 4: "motorcycle", 5: "airplane", 6: "bus", 7: "train", 8: "truck", 9: "boat",
    10: "traffic light", 11: "fire hydrant", 13: "stop sign", 14: "parking meter", 15: "bench", 16: "bird", 17: "cat",
    18: "dog", 19: "horse", 20: "sheep", 21: "cow", 22: "elephant", 23: "bear", 24: "zebra", 25: "giraffe",
    27: "backpack", 28: "umbrella", 31: "handbag", 32: "tie", 33: "suitcase", 34: "frisbee", 35: "skis",
    36: "snowboard", 37: "sports ball", 38: "kite", 39: "baseball bat", 40: "baseball glove", 41: "skateboard",
    42: "surfboard", 43: "tennis racket", 44: "bottle", 46: "wine glass", 47: "cup", 48: "fork", 49: "knife",
    50: "spoon", 51: "bowl", 52: "banana", 53: "apple", 54: "sandwich", 55: "orange", 56: "broccoli", 57: "carrot",
    58: "hot dog", 59: "pizza", 60: "donut", 61: "cake", 62: "chair", 63: "couch", 64: "potted plant", 65: "bed",
    67: "dining table", 70: "toilet", 72: "tv", 73: "laptop", 74: "mouse", 75: "remote", 76: "keyboard",
    77: "cell phone", 78: "microwave", 79: "oven", 80: "toaster", 81: "sink", 82: "refrigerator", 84: "book",
    85: "clock", 86: "vase", 87: "scissors", 88: "teddy bear", 89: "hair drier", 90: "toothbrush",
}  # fmt: skip


def coco_file(root: Path, split: str) -> Path:
    """Return the annotations of a split, of `COCO_SPLITS`, in COCO's folder."""
    return root / "annotations" / f"instances_{split}.json"


def read_coco(root: Path, split: str) -> dict[str, Any]:
    """Return the annotations of a split; its `COCO_LISTS` are there.

    Raises:
        ValueError: The file cannot be read, or is none of COCO's.
    """
    path = coco_file(root, split)
    try:
        annotations = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise ValueError(f"{path} is not JSON, or is truncated ({error})") from error
    if not isinstance(annotations, dict) or not all(isinstance(annotations.get(name), list) for name in COCO_LISTS):
        raise ValueError(f"{path} lacks one of the lists {', '.join(COCO_LISTS)}")
    return annotations


def ade20k_images(root: Path, split: str) -> list[Path]:
    """Return the images of a split, of `ADE20K_SPLITS`, in the folder `ADE20K_FOLDER`."""
    return list((root / "images" / split).glob("*.jpg"))
