"""Pipelines equal those of timm and torchvision."""

import contextlib
import random

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from timm.data.auto_augment import posterize
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from configs.schema import CenterCrop, Normalize, Resize, TimmTrainTransform, ToTensor, Transform
from data import build_transform
from data.samples import isolated_randomness
from data.transforms import _augment_operations

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.fixture
def image(pixels):
    return Image.fromarray(pixels(0, 70)).resize((90, 60))


@pytest.mark.parametrize("size", [32, 64])
def test_training_transform_is_timms(image, size):
    ours = build_transform([TimmTrainTransform(input_size=size)])
    reference = create_transform(
        size, is_training=True, color_jitter=0.4, auto_augment="rand-m9-mstd0.5-inc1", interpolation="random",
        re_prob=0.25, re_mode="pixel", re_count=1, mean=MEAN, std=STD,
    )  # fmt: skip
    num_compared = 0
    for seed in range(20):
        results = []
        for transform in (ours, reference):
            random.seed(seed)
            np.random.seed(seed)
            torch.manual_seed(seed)
            with contextlib.suppress(ValueError if transform is reference else ()):  # timm's posterize with Pillow 13
                results.append(transform(image))
        assert results[0].shape == (3, size, size)
        if len(results) == 2:
            torch.testing.assert_close(*results, rtol=0, atol=0)
            num_compared += 1
    assert num_compared >= 15


@pytest.mark.parametrize("policy", ["rand-m10-n60-inc1", "augmix-m10-w3", "v0"])
def test_posterizing_to_no_bit_gives_black(image, policy):
    transform = build_transform([TimmTrainTransform(input_size=32, auto_augment=policy)])
    for seed in range(10):
        with isolated_randomness(seed):
            assert transform(image).isfinite().all()
    operations = {op.name: op for op in _augment_operations(transform.transforms[0])}
    operation = next(op for name, op in operations.items() if name.startswith("Posterize"))
    assert operation.aug_fn(image, 0).getextrema() == ((0, 0),) * 3
    assert operation.aug_fn(image, 3).tobytes() == posterize(image, 3).tobytes()


def test_every_entry_of_the_training_transform_counts(image):
    entries = {"scale": [0.5, 0.5], "ratio": [1.0, 1.0], "hflip": 1.0, "vflip": 1.0, "auto_augment": None,
               "color_jitter": None, "interpolation": "bilinear", "re_prob": 0.0, "mean": [0.0] * 3,
               "std": [1.0] * 3}  # fmt: skip
    plain = TimmTrainTransform(input_size=32, **entries)
    changes = {"scale": [0.1, 0.1], "ratio": [3.0, 3.0], "hflip": 0.0, "vflip": 0.0, "color_jitter": 0.9,
               "auto_augment": "rand-m9", "interpolation": "nearest", "re_prob": 1.0, "mean": [0.5] * 3,
               "std": [0.5] * 3, "is_training": False}  # fmt: skip

    def apply(step):
        with isolated_randomness(3):
            return build_transform([step])(image)

    expected = apply(plain)
    for entry, value in changes.items():
        changed = TimmTrainTransform(input_size=32, **entries | {entry: value})
        assert not torch.equal(apply(changed), expected), entry


def test_test_transform_is_torchvisions(image):
    ours = build_transform([Resize(size=36), CenterCrop(size=32), ToTensor(), Normalize()])
    reference = transforms.Compose([
        transforms.Resize(36, interpolation=InterpolationMode.BICUBIC), transforms.CenterCrop(32),
        transforms.ToTensor(), transforms.Normalize(MEAN, STD),
    ])  # fmt: skip
    torch.testing.assert_close(ours(image), reference(image), rtol=0, atol=0)


@pytest.mark.parametrize("policy", ["rand-m9-mstd0.5-inc1", "augmix-m3-w2", "original", None])
def test_a_gray_image_gets_the_pipeline_of_rgb(image, policy):
    gray = image.convert("L")
    options = {"input_size": 32, "interpolation": "bilinear", "color_jitter": 0.4, "auto_augment": policy}
    options |= {"re_prob": 1.0, "re_mode": "pixel"}
    ours = build_transform([TimmTrainTransform(**options, mean=[0.4], std=[0.2])], channels=1)
    reference = create_transform(**options, is_training=True, mean=[0.4] * 3, std=[0.2] * 3)
    for seed in range(20):
        with isolated_randomness(seed):
            found = ours(gray)
        with isolated_randomness(seed):
            expected = reference(gray.convert("RGB"))
        assert torch.equal(found, expected[:1])


def test_all_randomness_is_isolated(image):
    transform = build_transform([TimmTrainTransform(input_size=32, color_jitter=0.4, auto_augment="augmix-m3-w2")])
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    results = []
    for _ in range(2):
        with isolated_randomness(2**62 + 5):
            results.append(transform(image))
    assert torch.equal(*results)
    assert before == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([Resize()], "size is not set"),
        ([TimmTrainTransform()], "input_size"),
        ([Transform(type="Warp")], "Warp"),
        ([TimmTrainTransform(input_size=32, auto_augment="nonsense-m9")], "auto_augment='nonsense-m9'"),
    ],
)
def test_impossible_steps(steps, message):
    with pytest.raises(ValueError, match=message):
        build_transform(steps)
