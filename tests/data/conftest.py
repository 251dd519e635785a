"""Small data sets, and configurations that name them."""

import contextlib
import io
from pathlib import Path

import lmdb
import numpy as np
import pytest
from PIL import Image

from configs.schema import CenterCrop, Config, Normalize, Resize, TimmTrainTransform, ToTensor

SIZE = 32


def encode(pixels, image_format="PNG", **options):
    buffer = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(np.asarray(pixels))
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def picture(seed, side=24):
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)


@pytest.fixture(scope="session")
def encoded():
    return encode


@pytest.fixture(scope="session")
def pixels():
    return picture


@contextlib.contextmanager
def open_store(path, *, is_folder=False):
    with (
        lmdb.open(str(path), subdir=is_folder, map_size=1 << 24) as environment,
        environment.begin(write=True) as transaction,
    ):
        yield transaction


@pytest.fixture(scope="session")
def store():
    """Return a context that gives a transaction on an LMDB file."""
    return open_store


@pytest.fixture
def make_folders(tmp_path):
    """Return a function that writes class folders of images, each class with the given number of them."""

    def make(counts, root=None, image_format="PNG"):
        root = root or tmp_path / "set"
        suffix = {"PNG": ".png", "JPEG": ".JPEG"}[image_format]
        number = 0
        for split, classes in counts.items():
            for class_name, num_images in classes.items():
                folder = root / split / class_name
                folder.mkdir(parents=True, exist_ok=True)
                for _ in range(num_images):
                    (folder / f"image {number}{suffix}").write_bytes(encode(picture(number), image_format))
                    number += 1
        return root

    return make


@pytest.fixture
def make_config():
    """Return a function that makes a resolved configuration of a small run."""

    def make(root, *, num_classes=2, mode="train", workers=0, batch_size=4, **entries):
        config = Config(mode=mode, nb_classes=num_classes, size=SIZE)
        config.data.root = str(root)
        config.data.channels = 3
        config.data.nb_classes = num_classes
        config.data.train_transforms = [TimmTrainTransform(input_size=SIZE)]
        config.data.test_transforms = [Resize(size=36), CenterCrop(size=SIZE), ToTensor(), Normalize()]
        config.trainer.data.batch_size_per_gpu = batch_size
        config.trainer.data.batch_size_per_gpu_test = batch_size
        config.trainer.data.num_workers_per_gpu = workers
        for path, value in entries.items():
            holder = config.trainer.data if hasattr(config.trainer.data, path) else config.data
            setattr(holder, path, value)
        return config

    return make


@pytest.fixture
def two_classes(make_folders) -> Path:
    return make_folders({"train": {"ant": 9, "bee": 8}, "val": {"ant": 4, "bee": 3}})
