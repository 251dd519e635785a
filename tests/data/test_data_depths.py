"""The table of README.md: what every mode and depth becomes, against plain arithmetic on the raw values."""

import io
import struct
import zlib
from importlib.util import find_spec

import numpy as np
import pytest
from PIL import Image, PngImagePlugin
from torchvision.datasets.folder import pil_loader

from data.images import DECODERS, UnreadableImageError, decode
from model.pictures import is_image_name

LOADERS = [name for name in sorted(DECODERS) if find_spec("simplejpeg") or not name.startswith("simplejpeg")]
SHORT, LONG = 3, 4  # types of TIFF's entries


@pytest.fixture(params=LOADERS)
def load(request):
    return lambda data, **options: decode(data, name="a.tif", loader_type=request.param, **options)


def tiff(data, width, height, *, bits, photometric=1, sample_format=1):
    """Return a TIFF file of one uncompressed strip, made without an imaging library."""
    entries = {
        256: (LONG, width), 257: (LONG, height), 258: (SHORT, bits), 259: (SHORT, 1), 262: (SHORT, photometric),
        273: (LONG, 8), 277: (SHORT, 1), 278: (LONG, height), 279: (LONG, len(data)), 339: (SHORT, sample_format),
    }  # fmt: skip
    head = struct.pack("<2sHI", b"II", 42, 8 + len(data))
    table = b"".join(
        struct.pack("<HHIHH", tag, kind, 1, value, 0) if kind == SHORT else struct.pack("<HHII", tag, kind, 1, value)
        for tag, (kind, value) in sorted(entries.items())
    )
    return head + data + struct.pack("<H", len(entries)) + table + bytes(4)


def png(raw, width, height, *, depth, colour, chunks=()):
    """Return a PNG file made without an imaging library."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    rows = b"".join(b"\0" + bytes(row) for row in np.split(np.frombuffer(raw, np.uint8), height))
    parts = [
        chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)),
        *(chunk(kind, content) for kind, content in chunks),
        chunk(b"IDAT", zlib.compress(rows)),
        chunk(b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def gray(image):
    pixels = np.asarray(image)
    assert pixels.shape[2] == 3
    assert (pixels == pixels[..., :1]).all()
    return pixels[..., 0]


RAMP = np.linspace(0, 1, 64 * 16).reshape(16, 64)


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("1", lambda raw: 255 * (raw[..., :1] > 127)),
        ("L", lambda raw: raw[..., :1]),
        ("LA", lambda raw: raw[..., :1]),
        ("RGB", lambda raw: raw[..., :3]),
        ("RGBA", lambda raw: raw[..., :3]),
        ("CMYK", lambda raw: np.rint((255 - raw[..., :3].astype(float)) * (255 - raw[..., 3:]) / 255)),
    ],
    ids=["1", "L", "LA", "RGB", "RGBA", "CMYK"],
)
def test_modes_of_8_bits(load, encoded, mode, expected):
    raw = np.random.default_rng(0).integers(0, 256, (8, 8, 4), dtype=np.uint8)
    if mode == "1":
        source = Image.frombytes("L", (8, 8), raw[..., 0].tobytes()).convert("1", dither=Image.Dither.NONE)
    else:
        source = Image.frombytes(mode, (8, 8), raw[..., : len(mode)].tobytes())
    pixels = np.asarray(load(encoded(source, "PNG" if mode != "CMYK" else "TIFF"))).astype(int)
    assert np.abs(pixels - expected(raw)).max() <= (1 if mode == "CMYK" else 0)


def test_palette_with_transparency_keeps_its_colours(load):
    palette = np.random.default_rng(1).integers(0, 256, (4, 3), dtype=np.uint8)
    indices = np.array([[0, 1, 2, 3], [3, 2, 1, 0]], dtype=np.uint8)
    data = png(
        indices.tobytes(), 4, 2, depth=8, colour=3, chunks=[(b"PLTE", palette.tobytes()), (b"tRNS", bytes([0, 128]))]
    )
    np.testing.assert_array_equal(np.asarray(load(data)), palette[indices])


def test_ycbcr(load, encoded):
    source = np.zeros((8, 8, 3), dtype=np.uint8) + np.uint8([120, 90, 200])
    y, cb, cr = source[0, 0].astype(float)
    expected = [y + 1.402 * (cr - 128), y - 0.344136 * (cb - 128) - 0.714136 * (cr - 128), y + 1.772 * (cb - 128)]
    data = encoded(Image.frombytes("YCbCr", (8, 8), source.tobytes()), "TIFF")
    assert np.abs(np.asarray(load(data)) - np.rint(expected)).max() <= 1


def test_lab(load, encoded):
    """CIE L*a*b* at D50, adapted to D65 by Bradford, to sRGB."""
    lab = np.array([[70.0, 20.0, -30.0], [50.0, 0.0, 0.0], [30.0, 15.0, 25.0], [90.0, -5.0, 10.0]])
    f_y = (lab[:, 0] + 16) / 116
    f = np.stack([f_y + lab[:, 1] / 500, f_y, f_y - lab[:, 2] / 200], 1)
    xyz = np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29)) * [0.9642, 1.0, 0.8249]
    matrix = np.array([[3.1339, -1.6169, -0.4906], [-0.9788, 1.9161, 0.0335], [0.0719, -0.2290, 1.4052]])
    linear = (xyz @ matrix.T).clip(0, 1)
    expected = 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    stored = np.concatenate([lab[:, :1] * 2.55, lab[:, 1:]], 1).round().astype(np.int16).astype(np.uint8)
    pixels = np.asarray(load(encoded(Image.frombytes("LAB", (4, 1), stored.tobytes()), "TIFF")))
    assert np.abs(pixels[0] - expected).max() < 3


@pytest.mark.parametrize("order", ["<", ">"])
def test_16_bits(load, order):
    values = np.rint(RAMP * 65535).astype(np.uint16)
    expected = np.rint(values / 257)
    data = png(values.astype(">u2").tobytes(), 64, 16, depth=16, colour=0) if order == ">" else tiff(
        values.astype("<u2").tobytes(), 64, 16, bits=16
    )  # fmt: skip
    np.testing.assert_array_equal(gray(load(data)), expected)


def test_16_bits_with_colour_keep_the_high_byte(load):
    values = np.random.default_rng(2).integers(0, 65536, (5, 7, 3), dtype=np.uint16)
    data = png(values.astype(">u2").tobytes(), 7, 5, depth=16, colour=2)
    np.testing.assert_array_equal(np.asarray(load(data)), values >> 8)


def test_white_is_zero(load):
    values = np.rint(RAMP * 65535).astype("<u2")
    pixels = gray(load(tiff(values.tobytes(), 64, 16, bits=16, photometric=0)))
    np.testing.assert_array_equal(pixels, np.rint((65535 - values.astype(float)) / 257))


def test_12_bits(load):
    values = np.rint(RAMP * 4095).astype(int)
    first, second = values[:, ::2], values[:, 1::2]
    packed = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], -1).astype(np.uint8)
    pixels = gray(load(tiff(packed.tobytes(), 64, 16, bits=12)))
    np.testing.assert_array_equal(pixels, np.rint(values * 255 / 4095))


@pytest.mark.parametrize("highest", [1023, 4095, 65535])
def test_pgm_says_its_white(load, highest):
    values = np.rint(RAMP * highest).astype(">u2")
    data = b"P5 64 16 %d\n" % highest + values.tobytes()
    assert np.abs(gray(load(data)) - RAMP * 255).max() <= 1


def test_float_from_0_to_1(load):
    values = RAMP.astype("<f4")
    pixels = gray(load(tiff(values.tobytes(), 64, 16, bits=32, sample_format=3)))
    np.testing.assert_array_equal(pixels, np.rint(values * np.float32(255)))


@pytest.mark.parametrize(
    ("values", "bits", "sample_format", "message"),
    [
        ((RAMP * 255).astype("<f4"), 32, 3, "values from 0 to 255, outside 0 to 1"),
        ((RAMP * 65535).astype("<f4"), 32, 3, "values from 0 to 65535, outside 0 to 1"),
        ((RAMP - 0.5).astype("<f4"), 32, 3, "values from -0.5 to 0.5"),
        (np.full((16, 64), np.nan, "<f4"), 32, 3, "values from nan to nan"),
        ((RAMP / 1000).astype("<f4"), 32, 3, "all but black; scale them"),
        ((RAMP * 255).astype("<u4"), 32, 1, "integers of 32 bits"),
        ((RAMP * 4095).astype("<i4"), 32, 2, "integers of 32 bits"),
        ((RAMP * 32767).astype("<i2"), 16, 2, "with a sign"),
        ((RAMP * 4095).astype("<u2"), 16, 1, "values from 0 to 4095, where 65535 is white: all but black"),
        ((RAMP * 255).astype("<u2"), 16, 1, "values from 0 to 255, where 65535 is white: all but black"),
    ],
)
def test_values_without_a_rule_are_refused_by_name(load, values, bits, sample_format, message):
    data = tiff(values.tobytes(), 64, 16, bits=bits, sample_format=sample_format)
    with pytest.raises(UnreadableImageError, match=rf"^a\.tif: unreadable image \(.*{message}"):
        load(data)


@pytest.mark.parametrize("value", [0, 300, 65535])
def test_an_image_of_one_value_is_no_mistake(load, value):
    data = tiff(np.full((16, 64), value, "<u2").tobytes(), 64, 16, bits=16)
    assert (gray(load(data)) == round(value / 257)).all()


def test_premultiplied_transparency(load):
    values = np.array([[[100, 255], [40, 128]]], dtype=np.uint8)
    np.testing.assert_allclose(gray(load(tiff_with_alpha(values)))[0], [100, 40 * 255 / 128], atol=1)


def tiff_with_alpha(values):
    buffer = io.BytesIO()
    Image.merge("LA", [Image.fromarray(values[..., i]) for i in range(2)]).save(buffer, "TIFF")
    data = bytearray(buffer.getvalue())
    position = data.index(struct.pack("<HHIH", 338, SHORT, 1, 2))
    data[position + 8] = 1  # associated: the colours are multiplied already
    return bytes(data)


@pytest.mark.parametrize("kind", ["text", "late text", "profile"])
def test_a_long_text_or_profile_is_no_obstacle(load, pixels, kind):
    image, info, buffer = Image.fromarray(pixels(0)), PngImagePlugin.PngInfo(), io.BytesIO()
    if kind != "profile":
        info.add_text("note", "x" * (2 << 20), zip=True)
    image.save(buffer, "PNG", pnginfo=info, icc_profile=bytes(3 << 20) if kind == "profile" else None)
    data = buffer.getvalue()
    if kind == "late text":
        start = data.index(b"zTXt") - 4
        end = start + 12 + int.from_bytes(data[start : start + 4], "big")
        data = data[:start] + data[end:-12] + data[start:end] + data[-12:]
    np.testing.assert_array_equal(np.asarray(load(data)), pixels(0))


def test_an_empty_file_says_so(load):
    with pytest.raises(UnreadableImageError, match=r"a\.tif: unreadable image \(the file is empty\)"):
        load(b"")


def test_the_limit_on_pixels_is_the_same_for_every_loader(load, encoded, pixels, monkeypatch):
    data = encoded(pixels(0, 24))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1)
    assert load(data, max_pixels=24 * 24).size == (24, 24)
    with pytest.raises(UnreadableImageError, match=r"24 x 24 pixels, more than data\.max_pixels=575"):
        load(data, max_pixels=575)
    assert Image.MAX_IMAGE_PIXELS == 1


@pytest.mark.parametrize(("kind", "num_bytes"), [("PNG", 12), ("PNG", 16), ("GIF", 1), ("JPEG", 2), ("JPEG", 1)])
def test_a_file_without_its_end_is_what_torchvisions_loader_makes_of_it(
    load, encoded, pixels, tmp_path, kind, num_bytes
):
    path = tmp_path / "a"
    path.write_bytes(encoded(Image.fromarray(pixels(0)), kind)[:-num_bytes])
    if kind == "JPEG":
        with pytest.raises(OSError, match="truncated"):
            pil_loader(path)
        with pytest.raises(UnreadableImageError, match="truncated"):
            load(path.read_bytes())
    else:
        np.testing.assert_array_equal(np.asarray(load(path.read_bytes())), np.asarray(pil_loader(path)))


@pytest.mark.parametrize("mode", ["P", "L"])
def test_the_first_picture_of_an_animation(load, pixels, mode):
    first, second = (Image.fromarray(pixels(number)).convert(mode) for number in range(2))
    buffer = io.BytesIO()
    first.save(buffer, "GIF", save_all=True, append_images=[second])
    np.testing.assert_array_equal(np.asarray(load(buffer.getvalue())), np.asarray(first.convert("RGB")))


def test_avif(load, encoded):
    data = encoded(np.full((16, 16, 3), (200, 60, 20), dtype=np.uint8), "AVIF", quality=95)
    assert np.abs(np.asarray(load(data)).astype(int) - (200, 60, 20)).max() < 8
    assert is_image_name("a.AVIF")
    assert is_image_name("a.gif")


def test_heic_says_what_it_needs(load, monkeypatch):
    monkeypatch.setattr("model.pictures.missing_decoders", lambda: {".heic": "install it"})
    with pytest.raises(UnreadableImageError, match="a HEIC image; install it"):
        load(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")


def test_heic(load):
    pillow_heif = pytest.importorskip("pillow_heif")
    buffer = io.BytesIO()
    pillow_heif.from_pillow(Image.new("RGB", (16, 24), (200, 60, 20))).save(buffer)
    image = load(buffer.getvalue())
    assert image.size == (16, 24)
    assert np.abs(np.asarray(image).astype(int) - (200, 60, 20)).max() < 8
    assert is_image_name("IMG_1.HEIC")
    with pytest.raises(UnreadableImageError, match=r"data\.max_pixels=3"):
        load(buffer.getvalue(), max_pixels=3)


@pytest.mark.parametrize("source", ["L", "LA", "RGB", "RGBA", "CMYK", "P"])
def test_gray_is_the_luma_of_rgb(load, encoded, pixels, source):
    image = Image.fromarray(np.dstack([pixels(0), pixels(1)[..., 0]])).convert("RGB" if source == "CMYK" else "RGBA")
    data = encoded(image.convert("RGB").convert("P") if source == "P" else image.convert(source), "TIFF")
    colours = np.asarray(load(data)).astype(float)
    found = load(data, mode="L")
    assert found.mode == "L"
    luma = colours @ (0.299, 0.587, 0.114)  # ITU-R BT.601
    assert np.abs(np.asarray(found) - luma).max() <= 0.51
    if source in ("L", "LA"):
        np.testing.assert_array_equal(np.asarray(found), colours[..., 0])


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_transparency_is_the_fourth_channel(load, encoded, pixels, kind):
    raw = np.dstack([pixels(0), pixels(1)[..., 0] | 1])
    data = encoded(raw, kind, **({"lossless": True} if kind == "WEBP" else {}))
    np.testing.assert_array_equal(np.asarray(load(data, mode="RGBA")), raw)


@pytest.mark.parametrize("colour", [0, 2], ids=["gray", "RGB"])
def test_a_transparent_colour_is_transparent(load, colour):
    raw = bytes(range(24)) if colour else bytes(range(8))
    mark = struct.pack(">HHH", 3, 4, 5) if colour else struct.pack(">H", 1)
    image = load(png(raw, 4, 2, depth=8, colour=colour, chunks=[(b"tRNS", mark)]), mode="RGBA")
    np.testing.assert_array_equal(np.asarray(image)[..., 3].ravel(), [255, 0, *6 * [255]])


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP"])
def test_an_image_without_transparency_is_opaque(load, encoded, pixels, kind):
    data = encoded(pixels(0), kind)
    found = np.asarray(load(data, mode="RGBA"))
    assert (found[..., 3] == 255).all()
    np.testing.assert_array_equal(found[..., :3], np.asarray(load(data)))
