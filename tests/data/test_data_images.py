"""Image files of every kind become RGB with 8 bits a channel."""

import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from data.images import UnreadableImageError, decode
from model.pictures import is_image_name


@pytest.fixture(params=["pil", "torchvision"])
def load(request):
    return lambda data: decode(data, name="a.png", loader_type=request.param)


@pytest.mark.parametrize("image_format", ["PNG", "BMP", "PPM", "TIFF"])
def test_lossless_formats_keep_every_pixel(load, encoded, pixels, image_format):
    expected = pixels(0)
    image = load(encoded(expected, image_format))
    assert image.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(image), expected)


@pytest.mark.parametrize("image_format", ["PNG", "TIFF"])
def test_16_bit_values_are_scaled_not_clipped(load, encoded, image_format):
    values = np.array([[0, 257, 1000, 32768, 65535]], dtype=np.uint16)
    red = np.asarray(load(encoded(values, image_format)))[..., 0]
    np.testing.assert_array_equal(red, [[0, 1, 4, 128, 255]])


def test_16_bit_pgm_is_scaled(encoded):
    values = np.array([[0, 257, 65535]], dtype=np.uint16)
    image = decode(encoded(values, "PPM"), name="a.pgm", loader_type="pil")
    np.testing.assert_array_equal(np.asarray(image)[..., 2], [[0, 1, 255]])


def test_cmyk_jpeg_comes_close_to_its_rgb_original(load, encoded):
    colour = np.full((16, 16, 3), (200, 60, 20), dtype=np.uint8)
    image = load(encoded(Image.fromarray(colour).convert("CMYK"), "JPEG", quality=95))
    assert image.mode == "RGB"
    assert np.abs(np.asarray(image).astype(int) - colour).max() < 12


@pytest.mark.parametrize("transparency", [None, 0, bytes(range(256))], ids=["opaque", "one index", "per index"])
def test_palette_gives_its_colours_without_a_warning(load, encoded, pixels, transparency):
    palette = Image.fromarray(pixels(1, 8)).convert("P", palette=Image.Palette.ADAPTIVE)
    options = {} if transparency is None else {"transparency": transparency}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image = load(encoded(palette, **options))
    np.testing.assert_array_equal(np.asarray(image), np.asarray(palette.convert("RGB")))


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "1"])
def test_other_modes_drop_transparency(load, encoded, pixels, mode):
    source = Image.fromarray(pixels(2, 8)).convert(mode)
    np.testing.assert_array_equal(np.asarray(load(encoded(source))), np.asarray(source.convert("RGB")))


def test_one_pixel(load, encoded):
    assert load(encoded(np.full((1, 1, 3), 7, dtype=np.uint8))).getpixel((0, 0)) == (7, 7, 7)


def test_exif_orientation_is_left_alone(load, encoded):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    assert load(encoded(Image.new("RGB", (20, 10)), "JPEG", exif=exif)).size == (20, 10)


@pytest.mark.parametrize("turns", [{}, {6: Image.Transpose.ROTATE_270, 3: Image.Transpose.ROTATE_180}])
def test_exif_orientation_is_applied_on_request(encoded, pixels, turns):
    source = Image.fromarray(pixels(5)).crop((0, 0, 20, 10))
    for orientation, turn in turns.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        image = decode(encoded(source, exif=exif), name="", loader_type="pil_upright")
        np.testing.assert_array_equal(np.asarray(image), np.asarray(source.transpose(turn)))
    image = decode(encoded(source), name="", loader_type="pil_upright")
    np.testing.assert_array_equal(np.asarray(image), np.asarray(source))


@pytest.mark.parametrize("image_format", ["PNG", "JPEG"])
def test_cut_short_or_no_image_is_unreadable(load, encoded, pixels, image_format):
    data = encoded(pixels(3, 64), image_format)
    for broken in (data[: len(data) // 2], data[:10], b"", b"<html>quota</html>"):
        with pytest.raises(UnreadableImageError, match=r"a\.png: unreadable"):
            load(broken)


def test_decoders_agree_on_jpeg(encoded):
    smooth = np.linspace(0, 255, 64 * 64 * 3).reshape(64, 64, 3).astype(np.uint8)
    data = encoded(smooth, "JPEG", quality=95)
    first, second = (np.asarray(decode(data, name="", loader_type=kind)).astype(int) for kind in ("pil", "torchvision"))
    assert np.abs(first - second).max() <= 3


def test_decoding_draws_no_random_numbers(load, encoded, pixels):
    state = torch.get_rng_state()
    load(encoded(pixels(4)))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    ("name", "expected"),
    [("a.JPEG", True), ("b.png", True), ("c.txt", False), (".d.jpg", False), ("._e.JPEG", False), ("jpg", False)],
)
def test_image_names(name, expected):
    assert is_image_name(name) is expected
