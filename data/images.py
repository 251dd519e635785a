"""Encoded images to RGB, gray or RGBA with 8 bits a channel; README.md has the table of what each mode becomes."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Iterator

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms.functional import to_pil_image

from model.messages import printable
from model.pictures import gray_range, open_image, to_mode

__all__ = [
    "DECODERS",
    "MAX_PIXELS",
    "MODES",
    "UnreadableImageError",
    "check_loader",
    "decode",
    "no_pixel_limit",
]

MAX_PIXELS = 178_956_970  # Pillow's own limit
MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # of Pillow, by the number of channels
JPEG_SIGNATURE = b"\xff\xd8\xff"
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_TEXTS = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")


class UnreadableImageError(ValueError):
    """An image that is missing or cannot be decoded.

    Args:
        name: The file or record.
        cause: What is wrong with it.
    """

    def __init__(self, name: str, cause: object) -> None:
        super().__init__(f"{name}: unreadable image ({cause})")
        self.name = name
        self.cause = printable(cause)


def decode(
    data: bytes, *, name: str, loader_type: str, max_pixels: int = MAX_PIXELS, mode: str = "RGB", as_array: bool = False
) -> Image.Image | np.ndarray:
    """Decode an image file's content to 8 bits a channel; of an animation, the first picture.

    An orientation in the EXIF data is not applied, except by ``pil_upright``: the published accuracies were measured
    with loaders that ignore it, and some images of ImageNet carry one.

    Args:
        data: The file's content.
        name: Names the image in errors.
        loader_type: A key of ``DECODERS``.
        max_pixels: Larger images are refused before they are decoded.
        mode: ``RGB``; ``L``: the luma of RGB; or ``RGBA``: opaque where the file says nothing.
        as_array: Return the same pixels as an array (H, W, C) or (H, W), uint8, which saves a copy where the decoder
            makes one.

    Raises:
        UnreadableImageError: If it cannot be decoded, or there is no rule for its values.
    """
    try:
        with no_pixel_limit():
            image = _decode(data, loader_type, max_pixels, mode)
            if as_array:
                return np.asarray(image)
            return image if isinstance(image, Image.Image) else Image.fromarray(image)
    except UnidentifiedImageError as error:  # its own text names a buffer
        raise UnreadableImageError(name, "not an image, or of an unknown format") from error
    except Exception as error:  # decoders raise nearly anything on a broken file
        raise UnreadableImageError(name, error) from error


@contextlib.contextmanager
def no_pixel_limit() -> Iterator[None]:
    """Lift Pillow's own limit on an image's size for the duration: ``max_pixels`` takes its place."""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def _decode(data: bytes, loader_type: str, max_pixels: int, mode: str) -> Image.Image | np.ndarray:
    if not data:
        raise ValueError("the file is empty")
    if loader_type.startswith("simplejpeg") and data.startswith(JPEG_SIGNATURE):
        pixels = _decode_jpeg(data, max_pixels, is_exact=loader_type == "simplejpeg")
        if pixels is not None:
            return pixels if mode == "RGB" else Image.fromarray(pixels).convert(mode)
    try:
        image = open_image(data)
        if image.width * image.height > max_pixels:
            raise ValueError(f"{image.width} x {image.height} pixels, more than data.max_pixels={max_pixels}")
        return DECODERS[loader_type](image, data, mode)
    except ValueError:
        # Pillow refuses a PNG with a text or colour profile of more than a MiB, on which no pixel depends.
        shorter = _without_texts(data)
        if shorter == data:
            raise
    return _decode(shorter, loader_type, max_pixels, mode)


def _without_texts(data: bytes) -> bytes:
    """Return a PNG file without its texts and colour profile; another file as it is."""
    if not data.startswith(PNG_SIGNATURE):
        return data
    kept, position = [PNG_SIGNATURE], len(PNG_SIGNATURE)
    while position < len(data):
        end = position + 12 + int.from_bytes(data[position : position + 4], "big")  # length, kind, content, checksum
        if data[position + 4 : position + 8] not in PNG_TEXTS:
            kept.append(data[position:end])
        position = end
    return b"".join(kept)


def _decode_with_pil(image: Image.Image, data: bytes, mode: str) -> Image.Image:
    return to_mode(image, gray_range(image), mode)


def _decode_upright(image: Image.Image, data: bytes, mode: str) -> Image.Image:
    return to_mode(ImageOps.exif_transpose(image), gray_range(image), mode)


def _decode_with_torchvision(image: Image.Image, data: bytes, mode: str) -> Image.Image:
    is_simple = image.mode in ("L", "RGB") and not (mode == "RGBA" and image.has_transparency_data)
    if image.format not in ("JPEG", "PNG", "WEBP") or not is_simple:
        return _decode_with_pil(image, data, mode)
    try:
        pixels = decode_image(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)
    except RuntimeError:
        return _decode_with_pil(image, data, mode)  # which reads some files that lack their last bytes
    if pixels.dtype != torch.uint8:
        return _decode_with_pil(image, data, mode)
    return to_pil_image(pixels).convert(mode)


def _decode_jpeg(data: bytes, max_pixels: int, *, is_exact: bool) -> np.ndarray | None:
    """Return a gray or RGB JPEG file as an array (H, W, 3), straight from libjpeg-turbo; None for all others."""
    import simplejpeg  # optional; `check_loader` has found it

    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        if colours not in ("Gray", "YCbCr", "RGB") or height * width > max_pixels:
            return None
        return simplejpeg.decode_jpeg(data, fastdct=not is_exact, fastupsample=not is_exact)
    except ValueError:  # Pillow reads some files that lack their last bytes, and says what is wrong with others
        return None


DECODERS: dict[str, Callable[[Image.Image, bytes, str], Image.Image]] = {
    "pil": _decode_with_pil,
    "pil_upright": _decode_upright,
    "torchvision": _decode_with_torchvision,
    "simplejpeg": _decode_with_pil,  # what is no gray or RGB JPEG file
    "simplejpeg_fast": _decode_with_pil,
}


def check_loader(loader_type: str) -> None:
    """Check that the package that decodes is installed.

    Raises:
        ValueError: If it is not.
    """
    if loader_type.startswith("simplejpeg") and importlib.util.find_spec("simplejpeg") is None:
        raise ValueError(f"data.loader_type={loader_type} needs the package simplejpeg; `pip install simplejpeg`")
