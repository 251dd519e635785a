"""The names of a checkpoint's classes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from timm.data import ImageNetInfo

from configs.schema import Data

from .base import index_names
from .files import class_folders

__all__ = ["ClassNames", "find_class_names"]

SYNSET = re.compile(r"n\d{8}")  # how ImageNet names its folders


class ClassNames(NamedTuple):
    """Names by class index.

    Attributes:
        identifiers: As the data set has them; ImageNet's are synsets, such as n02123045.
        words: For people; those of a synset are WordNet's, others are the identifiers themselves.
        origin: Where the names are from.
    """

    identifiers: list[str]
    words: list[str]
    origin: str


def find_class_names(saved: object, data: Data, *, num_classes: int) -> ClassNames:
    """Return the names of the classes of a checkpoint.

    They are those that the checkpoint was saved with; else those of the class folders in ``data.root``, where these are
    as many; else ImageNet's for 1000 classes; else the indices.

    Args:
        saved: The checkpoint's entry of names, if there is one; only a list of texts is used.
        data: The configuration's data set.
        num_classes: Classes of the network.
    """
    root = Path(data.root).expanduser()
    folders = (root / split for split in ("train", "val")) if data.type == "DefaultCLS" else ()
    is_list = isinstance(saved, list) and all(isinstance(name, str) for name in saved)
    choices = [(saved if is_list else [], "the checkpoint's own")]
    choices += [(class_folders(folder), f"the folders in {folder}") for folder in folders]
    choices += [(ImageNetInfo().label_names(), "ImageNet's"), (index_names(num_classes), "their indices")]
    names, origin = next(choice for choice in choices if len(choice[0]) == num_classes)
    return ClassNames(list(names), _words(names), origin)


def _words(names: Sequence[str]) -> list[str]:
    if not all(SYNSET.fullmatch(name) for name in names):
        return list(names)
    info = ImageNetInfo()
    return [_describe(info, name) for name in names]


def _describe(info: ImageNetInfo, synset: str) -> str:
    try:
        return info.label_name_to_description(synset)
    except KeyError:  # not one of the 21,841 of ImageNet
        return synset
