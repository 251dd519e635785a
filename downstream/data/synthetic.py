"""Tiny synthetic COCO and ADE20K folders of drawn shapes, in the layout and with the classes of the real ones."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from model.files import replacing_folder

from .layout import ADE20K_FOLDER, ADE20K_SPLITS, COCO_CATEGORIES, COCO_SPLITS, coco_file
from .shapes import Scene, draw_scene

__all__ = ["write_ade20k", "write_coco"]

# The classes of the kinds of shape: COCO category ids; ADE20K labels, the first and the last class among them.
CATEGORY_IDS = (37, 72, 38, 90)  # sports ball, tv, kite, toothbrush
LABELS = (120, 44, 150, 13)  # ball, signboard, flag, person
GROUND_LABEL = 1  # wall
CROWD_EVERY = 8  # one image in so many has a crowd: two neighbours annotated as one region
JPEG_QUALITY = 95


def write_coco(out: Path, *, num_train: int, num_val: int, size: tuple[int, int], seed: int = 0) -> dict[str, int]:
    """Write a COCO folder: ``annotations/instances_{train,val}2017.json``, ``train2017/``, ``val2017/``.

    All 80 categories are listed, four have instances. Masks are polygons, those of crowds run lengths.

    Args:
        out: Folder to make; it must not exist.
        num_train: Images in train2017.
        num_val: Images in val2017.
        size: Height and width in pixels.
        seed: Another seed draws other images.

    Returns:
        Number of images by split.

    Raises:
        ValueError: A number is too small.
        FileExistsError: The folder is there already.
    """
    return _write(out, _write_coco_split, dict(zip(COCO_SPLITS, (num_train, num_val), strict=True)), size, seed)


def write_ade20k(out: Path, *, num_train: int, num_val: int, size: tuple[int, int], seed: int = 0) -> dict[str, int]:
    """Write an ADE20K folder: ``ADEChallengeData2016/{images,annotations}/{training,validation}/``.

    Five of the 150 classes occur, the ground's being one; a corner of every image has none.

    Args, Returns, Raises: As `write_coco`.
    """
    return _write(out, _write_ade20k_split, dict(zip(ADE20K_SPLITS, (num_train, num_val), strict=True)), size, seed)


def _write(
    out: Path, write_split: Callable[..., None], counts: Mapping[str, int], size: tuple[int, int], seed: int
) -> dict[str, int]:
    if min(counts.values()) < 1 or min(size) < 32 or seed < 0:
        raise ValueError(
            f"{dict(counts)} images of {size[0]} x {size[1]} pixels with seed {seed}: give at least 1 image a split, "
            "32 pixels and a seed from 0"
        )
    if out.exists():
        raise FileExistsError(f"{out} exists; name another folder, or remove it first")
    with replacing_folder(out) as aside:
        for number, (split, count) in enumerate(counts.items()):
            scenes = (draw_scene(*size, seed=(seed, number, index)) for index in range(count))
            write_split(aside, split, scenes)
    return dict(counts)


def _write_coco_split(root: Path, split: str, scenes: Iterator[Scene]) -> None:
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image_id, scene in enumerate(scenes, start=1):
        name = f"{image_id:012d}.jpg"
        _save_image(scene.image, root / split / name)
        height, width = scene.image.shape[:2]
        images.append({"id": image_id, "file_name": name, "height": height, "width": width})
        for annotation in _annotations(scene, is_crowded=image_id % CROWD_EVERY == 0):
            annotations.append({"id": len(annotations) + 1, "image_id": image_id, **annotation})
    categories = [
        {"id": number, "name": name, "supercategory": "synthetic"} for number, name in COCO_CATEGORIES.items()
    ]
    path = coco_file(root, split)
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))


def _annotations(scene: Scene, *, is_crowded: bool) -> Iterator[dict[str, Any]]:
    """Yield an annotation a shape; in a crowded image, the last shape counts as a crowd and not as an instance."""
    last = scene.shapes[-1] if is_crowded and len(scene.shapes) > 1 else None
    for shape in scene.shapes:
        outline = [[round(float(value), 2) for value in shape.polygon.reshape(-1)]]
        yield {
            "category_id": CATEGORY_IDS[shape.kind],
            "bbox": list(shape.box),
            "area": int(shape.mask.sum()),
            "iscrowd": int(shape is last),
            "segmentation": run_lengths(shape.mask) if shape is last else outline,
        }


def run_lengths(mask: NDArray[np.bool_]) -> dict[str, Any]:
    """Return a mask as COCO's uncompressed run lengths: column by column, starting with the zeros."""
    flat = mask.reshape(-1, order="F")
    starts = np.flatnonzero(np.diff(flat, prepend=False))
    counts = np.diff(starts, prepend=0, append=flat.size)
    return {"size": list(mask.shape), "counts": counts.tolist()}


def _write_ade20k_split(root: Path, split: str, scenes: Iterator[Scene]) -> None:
    short = {"training": "train", "validation": "val"}[split]
    for number, scene in enumerate(scenes, start=1):
        name = f"ADE_{short}_{number:08d}"
        labels = np.full(scene.image.shape[:2], GROUND_LABEL, dtype=np.uint8)
        labels[scene.blank] = 0
        for shape in scene.shapes:
            labels[shape.mask] = LABELS[shape.kind]
        _save_image(scene.image, root / ADE20K_FOLDER / "images" / split / f"{name}.jpg")
        _save_image(labels, root / ADE20K_FOLDER / "annotations" / split / f"{name}.png")


def _save_image(pixels: NDArray[np.uint8], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, quality=JPEG_QUALITY)
