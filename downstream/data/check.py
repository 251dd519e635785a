"""Checks that a folder holds COCO or ADE20K, complete and in the layout that mmdet and mmseg read.

Nothing of OpenMMLab is needed. A check returns what it counted and every kind of problem, with the first offenders.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from model.messages import listed

from .layout import (
    ADE20K_CLASSES,
    ADE20K_FOLDER,
    ADE20K_SPLITS,
    COCO_CATEGORIES,
    COCO_SPLITS,
    ade20k_images,
    coco_file,
    read_coco,
)

__all__ = ["check_ade20k", "check_coco", "label_problem"]

NUM_SHOWN = 3
IGNORED = 255  # a label that mmseg leaves out, as it does 0
OVERHANG = 1.0  # pixels by which a box may leave its image: COCO's own are rounded


def check_coco(
    root: Path, *, is_any_size: bool = False, classes: Sequence[str] | None = None
) -> tuple[dict[str, int], list[str]]:
    """Check ``annotations/instances_{train,val}2017.json``, ``train2017/`` and ``val2017/``.

    Args:
        root: The folder that holds these three.
        is_any_size: Accept other numbers of images than COCO's own.
        classes: The names of its categories, where they are not COCO's, or none of them to accept any; any number of
            images then.

    Returns:
        Number of images listed by split, and the problems.
    """
    counts, problems = {}, []
    for split, expected in COCO_SPLITS.items():
        path = coco_file(root, split)
        problems += _missing(root / split, path)
        if not path.exists():
            continue
        try:
            annotations = read_coco(root, split)
        except ValueError as error:
            problems.append(str(error))
            continue
        counts[split] = len(annotations["images"])
        if not is_any_size and classes is None:
            problems += _count_problem(path, counts[split], expected)
        try:
            problems += _image_problems(annotations["images"], root / split, path)
            problems += _category_problems(annotations, path, classes)
            problems += _annotation_problems(annotations, path)
        except (KeyError, TypeError, ValueError) as error:
            problems.append(f"{path} has an entry that is not COCO's: {type(error).__name__} {error}")
    return counts, problems


def check_ade20k(root: Path, *, is_any_size: bool = False) -> tuple[dict[str, int], list[str]]:
    """Check ``ADEChallengeData2016/{images,annotations}/{training,validation}/``; every label map is read.

    Args:
        root: The folder that holds ``ADEChallengeData2016``, or this one itself.
        is_any_size: Accept other numbers of images than ADE20K's own.

    Returns:
        Number of images by split, and the problems.
    """
    root = root if root.name == ADE20K_FOLDER else root / ADE20K_FOLDER
    counts, problems = {}, []
    for split, expected in ADE20K_SPLITS.items():
        images, labels = root / "images" / split, root / "annotations" / split
        absent = _missing(images, labels)
        problems += absent
        if absent:
            continue
        stems = {path.stem for path in ade20k_images(root, split)}
        labelled = {path.stem for path in labels.glob("*.png")}
        counts[split] = len(stems)
        if not is_any_size:
            problems += _count_problem(images, len(stems), expected)
        problems += _offenders(f"images without a label map in {labels}", stems - labelled)
        problems += _offenders(f"label maps without an image in {images}", labelled - stems)
        found = (label_problem(labels / f"{stem}.png") for stem in _progress(sorted(stems & labelled), split))
        problems += _offenders(f"label maps in {labels} are not ADE20K's", [problem for problem in found if problem])
    return counts, problems


def label_problem(path: Path, *, num_classes: int = ADE20K_CLASSES) -> str | None:
    """Return what is wrong with a label map, which is to hold 0 (no class) and 1..``num_classes``; None if nothing."""
    try:
        with Image.open(path) as image:
            labels = np.asarray(image)
    except (OSError, UnidentifiedImageError) as error:
        return f"{path.name} (cannot be read: {error})"
    if labels.ndim != 2:
        return f"{path.name} ({labels.shape[2]} channels, expected 1)"
    top = int(labels[labels != IGNORED].max(initial=0))
    return f"{path.name} (label {top}, expected 0..{num_classes})" if top > num_classes else None


def _missing(*paths: Path) -> list[str]:
    return [f"{path} is missing" for path in paths if not path.exists()]


def _image_problems(images: Iterable[Mapping[str, Any]], folder: Path, path: Path) -> Iterable[str]:
    names = [image["file_name"] for image in images]
    if folder.is_dir():
        present = {file.name for file in folder.iterdir()}
        yield from _offenders(f"images of {path.name} are not in {folder}", [n for n in names if n not in present])
    if len(set(names)) < len(names):
        yield f"{path} lists {len(names) - len(set(names))} images twice"


def _category_problems(annotations: Mapping[str, Any], path: Path, classes: Sequence[str] | None) -> Iterable[str]:
    categories = [(category["id"], category["name"]) for category in annotations["categories"]]
    names = [name for _, name in categories]
    if classes is None:
        if dict(categories) != COCO_CATEGORIES:
            yield (
                f"{path} has {len(names)} categories, or other ids, than COCO's {len(COCO_CATEGORIES)}: "
                f"{listed(names, NUM_SHOWN)} (--classes accepts those of your own)"
            )
        return
    if min(len(set(names)), len(dict(categories))) < len(names):
        yield f"{path} lists a category twice: {listed(names)}"
    if classes and sorted(classes) != sorted(names):
        yield f"{path} has the categories {listed(names)}, expected {listed(classes)}"


def _annotation_problems(annotations: Mapping[str, Any], path: Path) -> Iterable[str]:
    categories = {category["id"] for category in annotations["categories"]}
    sizes = {image["id"]: (image["width"], image["height"]) for image in annotations["images"]}
    instances = annotations["annotations"]
    strangers = [str(a["id"]) for a in instances if a["image_id"] not in sizes]
    yield from _offenders(f"annotations of {path} are of images that it does not list", strangers)
    unknown = [str(a["id"]) for a in instances if a["category_id"] not in categories]
    yield from _offenders(f"annotations of {path} are of categories that it does not list", unknown)
    outside = [
        str(a["id"]) for a in instances if a["image_id"] in sizes and not _fits(a["bbox"], *sizes[a["image_id"]])
    ]
    yield from _offenders(f"boxes of {path} are empty or leave their image", outside)


def _fits(box: tuple[float, float, float, float], width: int, height: int) -> bool:
    left, top, box_width, box_height = box
    is_inside = left + box_width <= width + OVERHANG and top + box_height <= height + OVERHANG
    return (
        min(box_width, box_height) >= 0 and max(box_width, box_height) > 0 and min(left, top) >= -OVERHANG and is_inside
    )


def _count_problem(where: Path, found: int, expected: int) -> Iterable[str]:
    if found != expected:
        yield f"{where} has {found:,} images, the published set {expected:,} (--any-size accepts a subset)"


def _offenders(title: str, names: Collection[str]) -> Iterable[str]:
    if names:
        yield f"{len(names)} {title}: {listed(sorted(names), NUM_SHOWN)}"


def _progress(names: list[str], title: str) -> Iterable[str]:
    return tqdm(names, desc=f"{title}: label maps", unit=" files", leave=False, disable=None)
