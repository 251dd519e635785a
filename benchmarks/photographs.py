"""Crops of the two photographs that come with scikit-learn: real pictures to quantise by and to compare answers on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

__all__ = ["write_crops"]

SIDES = (160, 400)  # pixels of a crop
SIDE = 256  # pixels of a picture


def write_crops(folder: Path, count: int, *, seed: int) -> list[Path]:
    """Write square crops of varied places and sizes as PNG; those that are there already stay.

    Args:
        folder: Where to; made if need be.
        count: How many.
        seed: Other crops for each.

    Returns:
        Their paths.
    """
    from sklearn.datasets import load_sample_images

    photographs = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    paths = []
    for index in range(count):
        photograph = photographs[index % len(photographs)]
        side = int(generator.integers(*SIDES))
        left, top = (int(generator.integers(length - side + 1)) for length in photograph.size)
        paths.append(folder / f"{index:04d}.png")
        if not paths[-1].exists():
            photograph.crop((left, top, left + side, top + side)).resize((SIDE, SIDE)).save(paths[-1])
    return paths
