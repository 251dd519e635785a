"""The shears, shifts and rotations of timm's augmentations by OpenCV in place of Pillow."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from PIL import Image
from timm.data.auto_augment import AugmentOp

__all__ = ["warp_by_opencv"]

Colour = tuple[int, ...]

WARPS = ("Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY", "TranslateXRel", "TranslateYRel")


def warp_by_opencv(operation: AugmentOp) -> None:
    """Let OpenCV move the pixels of an operation, if it moves any; what it draws stays the same.

    Raises:
        ValueError: If OpenCV is not installed.
    """
    if importlib.util.find_spec("cv2") is None:
        raise ValueError(
            "data.train_transforms: warp=opencv needs OpenCV; `pip install opencv-python-headless`, or set warp=pil"
        )
    if operation.name in WARPS:
        operation.aug_fn = partial(_warp, operation.aug_fn)


def _warp(function: Callable, image: Image.Image, *arguments: float, **options: Any) -> Image.Image:
    return function(_Warped(image), *arguments, **options)


class _Warped:
    """What timm's operations call of an image of Pillow, with the same meaning."""

    def __init__(self, image: Image.Image) -> None:
        self.image = image
        self.size = image.size

    def transform(
        self,
        size: tuple[int, int],
        method: Image.Transform,
        data: Sequence[float],
        *,
        resample: Image.Resampling,
        fillcolor: Colour,
    ) -> Image.Image:
        """Return the image moved by an affine map from its new places to the old ones."""
        assert (size, method) == (self.size, Image.Transform.AFFINE), "timm keeps the size"
        matrix = np.reshape(data, (2, 3)).astype(float)
        matrix[:, 2] += (matrix[:, 0] + matrix[:, 1] - 1) / 2  # a pixel's middle is at its index for OpenCV
        return self._moved(matrix, resample, fillcolor, is_inverse=True)

    def rotate(self, angle: float, *, resample: Image.Resampling, fillcolor: Colour) -> Image.Image:
        """Return the image turned around its middle, counter-clockwise, in degrees."""
        import cv2  # optional

        centre = ((self.size[0] - 1) / 2, (self.size[1] - 1) / 2)
        return self._moved(cv2.getRotationMatrix2D(centre, angle, 1.0), resample, fillcolor, is_inverse=False)

    def _moved(
        self, matrix: np.ndarray, resample: Image.Resampling, fillcolor: Colour, *, is_inverse: bool
    ) -> Image.Image:
        import cv2  # optional

        known = {Image.Resampling.BILINEAR: cv2.INTER_LINEAR, Image.Resampling.BICUBIC: cv2.INTER_CUBIC}
        flags = known.get(resample, cv2.INTER_NEAREST) | (cv2.WARP_INVERSE_MAP if is_inverse else 0)
        pixels = cv2.warpAffine(
            np.asarray(self.image),
            matrix,
            self.size,
            flags=flags,
            borderMode=cv2.BORDER_CONSTANT,
            borderValue=fillcolor,
        )
        return Image.fromarray(pixels)
