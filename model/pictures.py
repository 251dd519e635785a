"""Picture files: which ones can be decoded here, and their pixels with 8 bits a channel."""

from __future__ import annotations

import functools
import importlib.util
import io
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError, features
from PIL.TiffImagePlugin import TiffImageFile

from .messages import check_folder

__all__ = [
    "find_pictures",
    "gray_range",
    "image_suffixes",
    "is_image_name",
    "missing_decoders",
    "open_image",
    "read_picture",
    "to_mode",
]

SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".gif", ".jfif")
DARK = 16  # of 255: a deep image that nowhere reaches it would be black to the eye and to a network
BITS_PER_SAMPLE, PHOTOMETRIC, SAMPLE_FORMAT = 258, 262, 339  # tags of TIFF
IS_WHITE_ZERO, IS_UNSIGNED = 0, 1  # values of the last two


def is_image_name(name: str) -> bool:
    """Return whether a file name is that of an image: an extension that can be decoded here, and not hidden."""
    return name.lower().endswith(image_suffixes()) and not name.startswith(".")


@functools.cache
def image_suffixes() -> tuple[str, ...]:
    """Return the extensions of images that can be decoded here."""
    optional = (".avif", ".heic", ".heif")
    return (*SUFFIXES, *(suffix for suffix in optional if suffix not in missing_decoders()))


@functools.cache
def missing_decoders() -> dict[str, str]:
    """Return the extensions of images that this installation cannot decode, each with the way out."""
    missing = {}
    if not features.check("avif"):
        missing[".avif"] = "this Pillow lacks AVIF, newer ones have it"
    if importlib.util.find_spec("pillow_heif") is None:
        missing |= dict.fromkeys((".heic", ".heif"), "`pip install pillow-heif` makes HEIC readable")
    return missing


def find_pictures(folder: Path) -> list[Path]:
    """Return the visible pictures in a folder and below, in order.

    Raises:
        FileNotFoundError: If there are none, or no such folder.
    """
    check_folder(folder)
    files = sorted(
        file
        for file in folder.rglob("*")
        if is_image_name(file.name) and file.is_file() and not _is_hidden(file.relative_to(folder))
    )
    if not files:
        raise FileNotFoundError(
            f"there are no pictures in {folder} ({', '.join(image_suffixes())}): name another folder"
        )
    return files


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def read_picture(path: Path, mode: str = "RGB") -> Image.Image:
    """Return a picture as it lies in its file: an orientation noted beside the pixels is not applied.

    Args:
        path: The file.
        mode: As of `to_mode`.

    Raises:
        ValueError: If it cannot be read.
    """
    try:
        image = open_image(path.read_bytes())
        return to_mode(image, gray_range(image), mode)
    except UnidentifiedImageError as error:  # its own text names a buffer
        raise ValueError(f"{path} cannot be read (not an image, or of an unknown format): leave it out") from error
    except Exception as error:  # decoders raise nearly anything on a broken file
        raise ValueError(f"{path} cannot be read ({error}): leave it out") from error


def open_image(data: bytes) -> Image.Image:
    """Return an image of which only the header is read."""
    if data[4:8] != b"ftyp" or b"hei" not in data[8:64]:
        return Image.open(io.BytesIO(data))
    if ".heic" in missing_decoders():
        raise ValueError(f"a HEIC image; {missing_decoders()['.heic']}")
    from pillow_heif import HeifImageFile  # optional

    return HeifImageFile(io.BytesIO(data))


def gray_range(image: Image.Image) -> tuple[float, float] | None:
    """Return the values of black and white in a gray image of more than 8 bits; None for other images.

    Raises:
        ValueError: If no convention says which these are.
    """
    if image.mode == "F":
        black, white = 0.0, 1.0
    elif image.mode.startswith("I"):
        black, white = 0.0, 2.0 ** _depth(image) - 1
    else:
        return None
    is_inverted = isinstance(image, TiffImageFile) and image.tag_v2.get(PHOTOMETRIC) == IS_WHITE_ZERO
    return (white, black) if is_inverted else (black, white)


def _depth(image: Image.Image) -> int:
    """Return the bits of a gray image of integers."""
    if isinstance(image, TiffImageFile):
        (bits, *_), (sample_format, *_) = image.tag_v2[BITS_PER_SAMPLE], image.tag_v2.get(SAMPLE_FORMAT, (IS_UNSIGNED,))
        is_known = bits <= 16 and sample_format == IS_UNSIGNED
    else:
        bits = 16
        is_known = image.mode != "I" or image.format in ("PNG", "PPM")  # Pillow scales PPM to 16 bits
    if not is_known:
        raise ValueError("integers of 32 bits or with a sign, whose white no convention says; make it 8 or 16 bits")
    return bits


def to_mode(image: Image.Image, values: tuple[float, float] | None, mode: str) -> Image.Image:
    """Return an image with 8 bits a channel.

    Args:
        image: Of any mode of Pillow's.
        values: Its `gray_range`.
        mode: ``RGB``; ``L``: the luma of RGB; or ``RGBA``: opaque where the image says nothing.

    Raises:
        ValueError: If its values are outside the range, or all but black in it.
    """
    if values is not None:
        image = _to_8_bits(image, *values)
    elif image.mode == "La":  # TIFF with premultiplied transparency, from which Pillow converts only to LA
        image = image.convert("LA")
    elif "transparency" in image.info:
        image = image.convert("RGBA")  # Pillow warns where a palette with transparency goes to RGB at once
    if mode != "RGBA" or not image.has_transparency_data:
        image = image.convert("RGB")
    return image.convert(mode)


def _to_8_bits(image: Image.Image, black: float, white: float) -> Image.Image:
    values = np.asarray(image).astype(np.float32)
    low, high = values.min(), values.max()
    if not (min(black, white) <= low and high <= max(black, white)):
        raise ValueError(f"values from {low:g} to {high:g}, outside {min(black, white):g} to {max(black, white):g}")
    scaled = (values - black) * 255 / (white - black)
    if low < high and scaled.max() < DARK:
        raise ValueError(
            f"values from {low:g} to {high:g}, where {white:g} is white: all but black; scale them to the whole range"
        )
    return Image.fromarray(np.rint(scaled).astype(np.uint8))
