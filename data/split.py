"""One folder of class folders, split into training and test images."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

from model.files import replacing_folder
from model.messages import listed

from .files import ImageSearch, class_folders, read_file

__all__ = ["split_folder"]

SPLITS = {"train", "val", "valid", "validation", "test"}


def split_folder(root: Path, out: Path, *, share: float, seed: int = 0) -> dict[str, int]:
    """Copy ``<root>/<class>/...`` to ``<out>/<train|val>/<class>/...``, the same share of every class to each.

    The choice is random, but the same for the same seed. The folder appears only when it is complete; ``root`` stays
    unchanged.

    Args:
        root: The class folders.
        out: Folder to make.
        share: Of the images that become test images, rounded, but at least one and never all of a class.
        seed: Of the choice.

    Returns:
        The number of images by split.

    Raises:
        ValueError: If there are no class folders, one holds fewer than two images, ``root`` is split already, or
            ``out`` is there already or lies inside ``root``.
    """
    if out.exists():
        raise ValueError(f"{out} is there already; give another folder, or remove it first")
    if out.resolve().is_relative_to(root.resolve()):
        raise ValueError(f"{out} lies inside {root}, where it would count as a class; give a folder elsewhere")
    chosen = _choose(root, share=share, seed=seed)
    with replacing_folder(out) as aside:
        for split, names in chosen.items():
            for name in names:
                target = aside / split / name
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(read_file(root / name))
                shutil.copystat(root / name, target)
    return {split: len(names) for split, names in chosen.items()}


def _choose(root: Path, *, share: float, seed: int) -> dict[str, list[str]]:
    class_names = class_folders(root)
    if "train" in class_names and SPLITS.issuperset(class_names) and class_folders(root / "train"):
        raise ValueError(f"{root} is split already: it holds {listed(class_names)} with class folders; use it as it is")
    search = ImageSearch(root, class_names)
    images = {name: search.images(name) for name in class_names}
    search.report()
    if not images:
        raise ValueError(f"{root} holds no class folders; give the folder that holds one folder of images per class")
    small = [name for name, names in images.items() if len(names) < 2]
    if small:
        raise ValueError(f"{root}: fewer than two images, which cannot be split, in {listed(small)}")
    chosen: dict[str, list[str]] = {"train": [], "val": []}
    draw = random.Random(seed)
    for names in images.values():
        draw.shuffle(names)
        num_test = min(max(round(share * len(names)), 1), len(names) - 1)
        chosen["val"] += sorted(names[:num_test])
        chosen["train"] += sorted(names[num_test:])
    return chosen
