"""Comparison of a validation set with the one that published figures were measured on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePath

import numpy as np
from timm.data import ImageNetInfo

from data.base import ImageDataset, index_names
from model.zoo import Dataset

__all__ = ["doubt_of_size", "doubts_about"]


def doubts_about(images: ImageDataset, expected: Dataset) -> list[str]:
    """Return how a validation set differs from the expected one, or why that cannot be told; empty if it is the same.

    Args:
        images: The set at hand.
        expected: The published one.
    """
    doubt = doubt_of_size(len(images), expected)
    if doubt:
        return [doubt]
    if expected.fingerprint:
        found = images.fingerprint()
        return (
            [] if found == expected.fingerprint else [f"another set than {expected.title}: its fingerprint is {found}"]
        )
    if expected.class_list and expected.image_names and expected.images_per_class:
        return list(_differences(images, expected))
    return [f"no fingerprint of {expected.title} is known to compare this set's with, {images.fingerprint()}"]


def doubt_of_size(num_images: int, expected: Dataset) -> str:
    """Return why a set of so many images cannot be the expected one; empty if it can."""
    if num_images == expected.num_images:
        return ""
    kind = "a subset" if num_images < expected.num_images else "another set"
    return f"{num_images:,} images, where {expected.title} has {expected.num_images:,}: {kind}"


def _differences(images: ImageDataset, expected: Dataset) -> Iterator[str]:
    """Yield how the names and labels of a set differ from those of the expected one."""
    try:
        names = ImageNetInfo(expected.class_list).label_names()
    except AssertionError as error:  # timm's way to refuse a name
        raise ValueError(f"{expected.name} has class_list {expected.class_list!r}: {error}") from error
    is_named = images.class_names != index_names(len(images.class_names))
    if is_named and images.class_names != names:
        yield f"the class names are not those of {expected.title}, as {names[0]}"
    if images.labels is None:
        yield "the labels of the set are not known before it is read"
    elif (np.bincount(images.labels, minlength=expected.num_classes) != expected.images_per_class).any():
        yield f"not every class has {expected.images_per_class} images, as in {expected.title}"
    stems = {PurePath(images.name(index)).stem for index in range(len(images))}
    if stems != {expected.image_names.format(number) for number in range(1, expected.num_images + 1)}:
        yield f"the files are not named as those of {expected.title}, as {expected.image_names.format(1)}"
