"""Encoded images to RGB, gray or RGBA with 8 bits a channel; README.md has the table of what each mode becomes."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
from collections.abc import Callable, Iterator

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError, features
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms.functional import to_pil_image

from model.messages import printable

__all__ = [
    "DECODERS",
    "MAX_PIXELS",
    "MODES",
    "UnreadableImageError",
    "check_loader",
    "decode",
    "image_suffixes",
    "is_image_name",
    "missing_decoders",
    "no_pixel_limit",
]

MAX_PIXELS = 178_956_970  # Pillow's own limit
MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # of Pillow, by the number of channels
DARK = 16  # of 255: a deep image that nowhere reaches it would be black to the eye and to a network
JPEG_SIGNATURE = b"\xff\xd8\xff"
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_TEXTS = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")
BITS_PER_SAMPLE, PHOTOMETRIC, SAMPLE_FORMAT = 258, 262, 339  # tags of TIFF
IS_WHITE_ZERO, IS_UNSIGNED = 0, 1  # values of the last two


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


def is_image_name(name: str) -> bool:
    """Return whether a file name is that of an image: an extension that can be decoded here, and not hidden."""
    return name.lower().endswith(image_suffixes()) and not name.startswith(".")


@functools.cache
def image_suffixes() -> tuple[str, ...]:
    """Return the extensions of images that can be decoded here."""
    optional = {suffix for suffix in (".avif", ".heic", ".heif") if suffix not in missing_decoders()}
    return (*IMG_EXTENSIONS, ".gif", ".jfif", *optional)


@functools.cache
def missing_decoders() -> dict[str, str]:
    """Return the extensions of images that this installation cannot decode, each with the way out."""
    missing = {}
    if not features.check("avif"):
        missing[".avif"] = "this Pillow lacks AVIF, newer ones have it"
    if importlib.util.find_spec("pillow_heif") is None:
        missing |= dict.fromkeys((".heic", ".heif"), "`pip install pillow-heif` makes HEIC readable")
    return missing


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
        image = _open(data)
        if image.width * image.height > max_pixels:
            raise ValueError(f"{image.width} x {image.height} pixels, more than data.max_pixels={max_pixels}")
        return DECODERS[loader_type](image, data, mode)
    except ValueError:
        # Pillow refuses a PNG with a text or colour profile of more than a MiB, on which no pixel depends.
        shorter = _without_texts(data)
        if shorter == data:
            raise
    return _decode(shorter, loader_type, max_pixels, mode)


def _open(data: bytes) -> Image.Image:
    """Return an image of which only the header is read."""
    if data[4:8] != b"ftyp" or b"hei" not in data[8:64]:
        return Image.open(io.BytesIO(data))
    if ".heic" in missing_decoders():
        raise ValueError(f"a HEIC image; {missing_decoders()['.heic']}")
    from pillow_heif import HeifImageFile  # optional

    return HeifImageFile(io.BytesIO(data))


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
    return _to_mode(image, _range_of(image), mode)


def _decode_upright(image: Image.Image, data: bytes, mode: str) -> Image.Image:
    return _to_mode(ImageOps.exif_transpose(image), _range_of(image), mode)


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


def _range_of(image: Image.Image) -> tuple[float, float] | None:
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
    is_inverted = image.format == "TIFF" and image.tag_v2.get(PHOTOMETRIC) == IS_WHITE_ZERO
    return (white, black) if is_inverted else (black, white)


def _depth(image: Image.Image) -> int:
    """Return the bits of a gray image of integers."""
    if image.format == "TIFF":
        (bits, *_), (sample_format, *_) = image.tag_v2[BITS_PER_SAMPLE], image.tag_v2.get(SAMPLE_FORMAT, (IS_UNSIGNED,))
        is_known = bits <= 16 and sample_format == IS_UNSIGNED
    else:
        bits = 16
        is_known = image.mode != "I" or image.format in ("PNG", "PPM")  # Pillow scales PPM to 16 bits
    if not is_known:
        raise ValueError("integers of 32 bits or with a sign, whose white no convention says; make it 8 or 16 bits")
    return bits


def _to_mode(image: Image.Image, values: tuple[float, float] | None, mode: str) -> Image.Image:
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
