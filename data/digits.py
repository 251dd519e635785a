"""scikit-learn's handwritten digits as class folders: real images that come with a package."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from model.files import replacing_folder

__all__ = ["write_digits"]

MAX_INTENSITY = 16
TEST_SHARE = 0.2
SEED = 0


def write_digits(out: Path) -> bool:
    """Write the 1,797 digits (8 x 8 pixels) as ``<out>/<train|val>/<digit>/<number>.png``.

    The split is stratified, 80 to 20, and always the same. The folder appears only when it is complete.

    Args:
        out: Folder to make.

    Returns:
        Whether it was written; False if it was there already.

    Raises:
        ValueError: If ``out`` holds something else, or scikit-learn is missing.
    """
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise ValueError("the digits come with scikit-learn; install it with `pip install scikit-learn`") from error
    digits = load_digits()
    train, test = train_test_split(
        np.arange(len(digits.target)), test_size=TEST_SHARE, stratify=digits.target, random_state=SEED
    )
    places = {
        index: Path(split, str(digits.target[index]), f"{index:04d}.png")
        for split, indices in (("train", train), ("val", test))
        for index in indices
    }
    if out.is_dir() and any(out.iterdir()):
        found = {path.relative_to(out) for path in out.rglob("*.png")}
        if found == set(places.values()):
            return False
        raise ValueError(f"{out} holds other files than the digits; give another folder, or remove it first")
    with replacing_folder(out) as aside:
        for index, place in places.items():
            pixels = np.rint(digits.images[index] * (255 / MAX_INTENSITY)).astype(np.uint8)
            path = aside / place
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
    return True
