"""Encoded images to RGB images."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms.functional import to_pil_image

__all__ = ["DECODERS", "UnreadableImageError", "decode", "is_image_name"]


class UnreadableImageError(ValueError):
    """An image that is missing or cannot be decoded.

    Args:
        name: The file or record.
        cause: What is wrong with it.
    """

    def __init__(self, name: str, cause: object) -> None:
        super().__init__(f"{name}: unreadable image ({cause})")
        self.name = name


def is_image_name(name: str) -> bool:
    """Return whether a file name is that of an image: a known extension, and not hidden."""
    return name.lower().endswith(IMG_EXTENSIONS) and not name.startswith(".")


def decode(data: bytes, *, name: str, loader_type: str) -> Image.Image:
    """Decode an image file's content to RGB, 8 bits a channel.

    An orientation in the EXIF data is not applied, except by ``pil_upright``: the published accuracies were measured
    with loaders that ignore it, and some images of ImageNet carry one.

    Args:
        data: The file's content.
        name: Names the image in errors.
        loader_type: A key of ``DECODERS``.

    Raises:
        UnreadableImageError: If it cannot be decoded.
    """
    try:
        return DECODERS[loader_type](data)
    except UnidentifiedImageError as error:  # its own text names a buffer
        raise UnreadableImageError(name, "not an image, or of an unknown format") from error
    except Exception as error:  # decoders raise nearly anything on a broken file
        raise UnreadableImageError(name, error) from error


def _decode_with_pil(data: bytes) -> Image.Image:
    return _to_rgb(Image.open(io.BytesIO(data)))


def _decode_upright(data: bytes) -> Image.Image:
    return _to_rgb(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        # Pillow would clip 16-bit values at 255; it opens 16-bit PGM files with mode I.
        return _to_8_bits(np.asarray(image)).convert("RGB")
    if "transparency" in image.info:
        image = image.convert("RGBA")  # Pillow warns where a palette with transparency goes to RGB at once
    return image.convert("RGB")


def _decode_with_torchvision(data: bytes) -> Image.Image:
    try:
        pixels = decode_image(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)
    except RuntimeError:
        return _decode_with_pil(data)  # torchvision knows fewer formats
    if pixels.dtype == torch.uint16:
        return _to_8_bits(pixels.permute(1, 2, 0).numpy())
    return to_pil_image(pixels)


def _to_8_bits(values: np.ndarray) -> Image.Image:
    """Scale 16-bit values (H, W) or (H, W, 3) from 0..65535 to 0..255."""
    scaled = np.rint(values.clip(0, 65535) / 257)
    return Image.fromarray(scaled.astype(np.uint8))


DECODERS: dict[str, Callable[[bytes], Image.Image]] = {
    "pil": _decode_with_pil,
    "pil_upright": _decode_upright,
    "torchvision": _decode_with_torchvision,
}
