"""The data sets by type, and the checks before the first step."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from configs.schema import Config, Data
from model.messages import listed

from .annotations import INAT18CLS, INAT19CLS, CustomImageDataset, IN22KDataset
from .base import ImageDataset, index_names
from .cache import Cache
from .cifar import Cifar10CLS, Cifar100CLS
from .folders import DefaultCLS
from .images import MODES, check_loader
from .lmdb_folder import ImageFolderLMDB
from .shards import Shards, is_address

__all__ = ["DATASETS", "check_dataset", "check_same_classes", "count_classes", "open_datasets", "open_first"]

logger = logging.getLogger(__name__)


class _DatasetType(Protocol):
    def __call__(self, root: Any, *, split: str, loader_type: str, **options: Any) -> ImageDataset: ...


DATASETS: dict[str, _DatasetType] = {
    "DefaultCLS": DefaultCLS,
    "ImageFolderLMDB": ImageFolderLMDB,
    "IN22KDataset": IN22KDataset,
    "CustomImageDataset": CustomImageDataset,
    "Cifar10CLS": Cifar10CLS,
    "Cifar100CLS": Cifar100CLS,
    "INAT18CLS": INAT18CLS,
    "INAT19CLS": INAT19CLS,
    "Shards": Shards,
    "WebDataset": Shards,
}
CACHED = ("DefaultCLS", "Shards", "WebDataset")  # types that keep something in the cache


def open_first(config: Config) -> ImageDataset:
    """Open the training split, in the test modes the test split.

    Raises:
        ValueError: If it is missing or laid out otherwise.
    """
    return _open(config, _splits(config)[0])


def open_datasets(config: Config, *, first: ImageDataset | None = None) -> tuple[ImageDataset | None, ImageDataset]:
    """Open the splits that a run needs, and check them.

    Args:
        config: The resolved run.
        first: The split of `open_first`, where it is open already.

    Returns:
        The training split, None in the test modes, and the test split.

    Raises:
        ValueError: If something is missing, or the classes are not those that the configuration or the other split
            has.
    """
    name, *others = _splits(config)
    opened = {name: open_first(config) if first is None else first}
    opened |= {split: _open(config, split) for split in others}
    train, test = opened.get("train"), opened["val"]
    if train is not None:
        check_same_classes(train, test)
        _warn_of_unused_classes(train)
    for dataset in opened.values():
        _check_num_classes(dataset, _num_classes(config))
        logger.info("%s: %d images, %d classes", dataset.source, len(dataset), len(dataset.class_names))
    return train, test


def check_dataset(config: Config) -> None:
    """Check that a run's data set is there, is laid out as its type says, and has the classes of the configuration.

    Raises:
        ValueError: If not; the message names the way out.
    """
    open_datasets(config)


def count_classes(dataset: ImageDataset) -> int:
    """Return the number of classes in a split, for a configuration that leaves ``nb_classes`` open.

    Raises:
        ValueError: If it does not say how many classes there are.
    """
    found = len(dataset.class_names)
    if not dataset.has_all_classes:
        raise ValueError(
            f"{dataset.source} does not say how many classes there are (at least {found} by its images): set nb_classes"
        )
    logger.info("%s: %d classes, nb_classes follows", dataset.source, found)
    return found


def _splits(config: Config) -> tuple[str, ...]:
    return ("val",) if config.mode in ("test", "test_net") else ("train", "val")


def _open(config: Config, split: str) -> ImageDataset:
    data = config.data
    options = {"cache": Cache.create(data.cache, max_gb=data.cache_gb)} if data.type in CACHED else {}
    root = _root(data)
    check_loader(data.loader_type)
    dataset = DATASETS[data.type](root, split=split, loader_type=data.loader_type, **options)
    dataset.max_pixels, dataset.mode = data.max_pixels, MODES[data.channels]
    return dataset


def _root(data: Data) -> Path | str:
    """Return the folder, or the address, which only shards may have."""
    if is_address(data.root):
        if DATASETS[data.type] is not Shards:
            raise ValueError(f"data.root={data.root}: only shards are read from an address; set data.type=Shards")
        return data.root
    root = Path(data.root).expanduser()
    if not root.is_dir():
        raise ValueError(f"data.root={data.root}: there is no such folder; set data.root to that of the data set")
    return root


def _num_classes(config: Config) -> int:
    return config.nb_classes if config.data.nb_classes is None else config.data.nb_classes


def check_same_classes(train: ImageDataset, test: ImageDataset) -> None:
    """Compare the class names, where both splits give the whole list of them.

    Raises:
        ValueError: If they differ.
    """
    is_comparable = all(
        split.has_all_classes and split.class_names != index_names(len(split.class_names)) for split in (train, test)
    )
    if not is_comparable or train.class_names == test.class_names:
        return
    differences = [
        f"only in {split.source}: {listed(names)}"
        for split, other in ((train, test), (test, train))
        if (names := sorted(set(split.class_names) - set(other.class_names)))
    ]
    raise ValueError(
        f"the classes differ: {len(train.class_names)} in {train.source}, {len(test.class_names)} in {test.source}; "
        f"{'; '.join(differences) or 'the same names in another order'}; both need the same classes"
    )


def _check_num_classes(dataset: ImageDataset, num_classes: int) -> None:
    found = len(dataset.class_names)
    if found > num_classes or (dataset.has_all_classes and found != num_classes):
        least = "" if dataset.has_all_classes else "at least "
        raise ValueError(
            f"{dataset.source} has {least}{found} classes, but nb_classes is {num_classes}; set nb_classes={found} if "
            "this is the data set that is meant, else point data.root at another"
        )
    if dataset.labels is not None and dataset.labels.max() >= num_classes:
        worst = int(dataset.labels.argmax())
        raise ValueError(
            f"{dataset.name(worst)}: the class index {dataset.labels[worst]} is outside 0..{num_classes - 1}; correct "
            f"{dataset.source}, or set nb_classes"
        )


def _warn_of_unused_classes(train: ImageDataset) -> None:
    if train.labels is None:
        return
    counts = np.bincount(train.labels, minlength=len(train.class_names))
    unused = [train.class_names[index] for index in np.flatnonzero(counts == 0)]
    if unused:
        logger.warning("%s has no image of %d classes: %s", train.source, len(unused), listed(unused))
