"""Damaged image files: each gives an RGB image or an UnreadableImageError that names it, whoever decodes."""

from __future__ import annotations

import functools
import io
import warnings
from importlib.util import find_spec

import numpy as np
import pytest
from fuzzing import damaged, fuzzed, outcome
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from data.images import DECODERS, UnreadableImageError, decode
from model.pictures import missing_decoders

LOADERS = [name for name in sorted(DECODERS) if find_spec("simplejpeg") or not name.startswith("simplejpeg")]
MAX_PIXELS = 1 << 20
PIXELS = np.random.default_rng(0).integers(0, 256, (24, 20, 3), dtype=np.uint8)
DEEP = PIXELS[..., 0].astype(np.uint16) * 257
TRANSPARENT = Image.fromarray(np.dstack([PIXELS, PIXELS[..., 0]]))
EXIF = Image.Exif()
EXIF[0x0112] = 6  # turned by 90 degrees


def file(source: object, image_format: str, **options: object) -> bytes:
    image = source if isinstance(source, Image.Image) else Image.fromarray(np.asarray(source))
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def long_text() -> PngImagePlugin.PngInfo:
    info = PngImagePlugin.PngInfo()
    info.add_text("comment", "x" * (PngImagePlugin.MAX_TEXT_CHUNK + 1), zip=True)
    return info


def heic() -> bytes:
    pillow_heif = pytest.importorskip("pillow_heif", reason="`pip install pillow-heif` makes HEIC readable")
    buffer = io.BytesIO()
    pillow_heif.from_pillow(Image.fromarray(PIXELS)).save(buffer)
    return buffer.getvalue()


def avif() -> bytes:
    if ".avif" in missing_decoders():
        pytest.skip(missing_decoders()[".avif"])
    return file(PIXELS, "AVIF")


FILES = {
    "png": lambda: file(PIXELS, "PNG", exif=EXIF),
    "png palette": lambda: file(Image.fromarray(PIXELS).convert("P"), "PNG", transparency=bytes(range(256))),
    "png 16 bits": lambda: file(DEEP, "PNG"),
    "png text": lambda: file(PIXELS, "PNG", pnginfo=long_text()),
    "jpeg": lambda: file(PIXELS, "JPEG", exif=EXIF),
    "jpeg progressive": lambda: file(PIXELS, "JPEG", progressive=True),
    "jpeg cmyk": lambda: file(Image.fromarray(PIXELS).convert("CMYK"), "JPEG"),
    "gif": lambda: file(PIXELS, "GIF", save_all=True, append_images=[Image.fromarray(PIXELS[::-1])]),
    "bmp": lambda: file(PIXELS, "BMP"),
    "ppm": lambda: file(PIXELS, "PPM"),
    "pgm 16 bits": lambda: file(DEEP, "PPM"),
    "tiff": lambda: file(PIXELS, "TIFF"),
    "tiff lzw": lambda: file(TRANSPARENT, "TIFF", compression="tiff_lzw"),
    "tiff float": lambda: file(np.float32(PIXELS[..., 0]) / 255, "TIFF", compression="tiff_adobe_deflate"),
    "webp": lambda: file(PIXELS, "WEBP", lossless=True),
    "webp lossy": lambda: file(TRANSPARENT, "WEBP"),
    "avif": avif,
    "heic": heic,
}


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@functools.cache
def contents(kind: str) -> bytes:
    return FILES[kind]()


@pytest.mark.parametrize("kind", FILES)
def test_damaged_image(kind):
    intact = contents(kind)
    for loader in LOADERS:
        assert decode(intact, name="a", loader_type=loader).mode == "RGB"
    limit = Image.MAX_IMAGE_PIXELS

    @fuzzed
    @given(damaged(intact, head=200), st.sampled_from(LOADERS))
    @example(b"", "pil")
    def check(data: bytes, loader: str) -> None:
        image, refusal = outcome(
            lambda: decode(data, name="some/a.png", loader_type=loader, max_pixels=MAX_PIXELS), UnreadableImageError
        )
        if image is None:
            assert str(refusal).startswith("some/a.png: unreadable image (")
            assert refusal.cause
            assert refusal.cause.isprintable()
        else:
            assert image.mode == "RGB"
            assert 0 < image.width * image.height <= MAX_PIXELS
            image.tobytes()
        assert limit == Image.MAX_IMAGE_PIXELS

    check()
