"""Faster ways from a file to a crop: which give Pillow's pixels, and how far the others are from them."""

import importlib.util

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from sklearn.datasets import load_sample_images

from configs.schema import TimmTrainTransform
from data import build_loaders, build_transform, check_dataset
from data.images import decode
from data.prepare import to_shards
from data.samples import isolated_randomness

NEEDS_SIMPLEJPEG = pytest.mark.skipif(importlib.util.find_spec("simplejpeg") is None, reason="needs simplejpeg")
MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


@pytest.fixture(scope="module")
def photograph():
    return Image.fromarray(load_sample_images().images[0]).resize((243, 181))


def pixels_of(data, loader_type, **options):
    return np.asarray(decode(data, name="a.jpg", loader_type=loader_type, **options)).astype(int)


@NEEDS_SIMPLEJPEG
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize(
    "options", [{"subsampling": kind} for kind in range(3)] + [{"progressive": True}, {"keep_rgb": True}]
)
@pytest.mark.parametrize("quality", [30, 95])
def test_simplejpeg_gives_pillows_pixels(photograph, encoded, mode, options, quality):
    if mode != "RGB" and "keep_rgb" in options:
        pytest.skip("only RGB can be kept")
    data = encoded(photograph.convert(mode), "JPEG", quality=quality, **options)
    for channels in ("RGB", "L", "RGBA"):
        expected = pixels_of(data, "pil", mode=channels)
        for as_array in (False, True):
            assert np.array_equal(pixels_of(data, "simplejpeg", mode=channels, as_array=as_array), expected)


@NEEDS_SIMPLEJPEG
def test_the_fast_decoder_is_near_pillow(photograph, encoded):
    for subsampling in range(3):
        data = encoded(photograph, "JPEG", quality=90, subsampling=subsampling)
        difference = np.abs(pixels_of(data, "simplejpeg_fast") - pixels_of(data, "pil"))
        assert 0 < difference.mean() < 3
        assert (difference > 16).mean() < 0.02


@NEEDS_SIMPLEJPEG
@pytest.mark.parametrize("layout", ["DefaultCLS", "Shards"])
def test_batches_by_simplejpeg_are_pillows(make_folders, make_config, tmp_path, layout):
    root = make_folders({"train": {"ant": 5, "bee": 5}, "val": {"ant": 2, "bee": 2}}, image_format="JPEG")
    if layout == "Shards":
        to_shards(root, tmp_path / "packed", images_per_shard=4)
        root = tmp_path / "packed"
    found = []
    for loader_type in ("pil", "simplejpeg"):
        loaders = build_loaders(make_config(root, type=layout, loader_type=loader_type), rank=0, world_size=1)
        batches = [*loaders.train.iterate(0), *loaders.test.iterate()]
        found.append(torch.cat([batch.images for batch in batches]))
    assert torch.equal(*found)


def test_a_package_that_is_not_installed_is_named_at_the_start(two_classes, make_config, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "simplejpeg" else find_spec(name))
    with pytest.raises(ValueError, match="loader_type=simplejpeg_fast needs the package simplejpeg; `pip install"):
        check_dataset(make_config(two_classes, loader_type="simplejpeg_fast"))


def crop(image, **entries):
    """Return what a training transform makes of an image by its crop alone, as values from 0 to 255 (H, W, C)."""
    plain = {"auto_augment": None, "color_jitter": None, "re_prob": 0.0, "scale": [0.3, 1.0]} | entries
    results = []
    transform = build_transform([TimmTrainTransform(input_size=96, **plain)])
    for seed in range(12):
        with isolated_randomness(seed):
            results.append(transform(image).permute(1, 2, 0).numpy() * STD + MEAN)
    return np.rint(255 * np.stack(results)).astype(int)


@pytest.mark.parametrize(("interpolation", "limit"), [("bilinear", 1), ("bicubic", 12), ("random", 12)])
def test_pytorchs_resize_is_near_pillows_and_takes_the_same_crops(photograph, interpolation, limit):
    expected = crop(photograph, interpolation=interpolation)
    assert np.array_equal(crop(np.asarray(photograph), interpolation=interpolation), expected)
    difference = np.abs(crop(photograph, interpolation=interpolation, resize="torch") - expected)
    assert difference.max() <= limit
    assert 0 < (difference > 0).mean() < 0.1
    assert (difference > 1).mean() < 0.001


WARPS = ("Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel")


def operations(warp):
    """Return the operations of RandAugment by name."""
    pipeline = build_transform([TimmTrainTransform(input_size=96, warp=warp)])
    return {operation.name: operation for operation in pipeline.transforms[0].transforms[2].ops}


def test_opencv_moves_pixels_as_pillow_does(photograph):
    pytest.importorskip("cv2")
    ours, theirs = operations("opencv"), operations("pil")
    for name, operation in ours.items():
        is_warp = operation.aug_fn is not theirs[name].aug_fn
        assert is_warp == (name in WARPS), name
        limits = {Image.Resampling.BILINEAR: 5, Image.Resampling.BICUBIC: 25} if is_warp else {}
        for resample, limit in limits.items():
            for seed in range(6):
                found = []
                for each in (operation, theirs[name]):
                    each.prob, each.kwargs["resample"] = 1.0, resample
                    with isolated_randomness(seed):
                        found.append(np.asarray(each(photograph)).astype(int))
                is_filled = (np.stack(found) == each.kwargs["fillcolor"]).all(-1).any(0)
                is_inside = Image.fromarray(~is_filled).convert("L").filter(ImageFilter.MinFilter(5))  # not at its edge
                difference = np.abs(found[0] - found[1])[np.asarray(is_inside) > 0]
                assert len(difference) > 0.4 * is_filled.size
                assert difference.max() <= limit, (name, resample)
                assert difference.mean() < 1.5, (name, resample)


def test_a_package_that_warps_and_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="warp=opencv needs OpenCV; `pip install opencv-python-headless`"):
        build_transform([TimmTrainTransform(input_size=96, warp="opencv")])


def test_pytorchs_resize_knows_few_interpolations():
    with pytest.raises(ValueError, match="resize=torch knows the interpolations bilinear, bicubic, random"):
        build_transform([TimmTrainTransform(input_size=96, interpolation="lanczos", resize="torch")])
