"""The released checkpoints and their published figures, read from ``zoo.json`` or from a file of the same form."""

from __future__ import annotations

import difflib
import functools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from ..mobilemamba import VARIANTS
from .values import check_path, describe, fits

__all__ = ["TASKS", "Dataset", "Entry", "find", "models_of", "read_zoo", "released_entry"]

TASKS = ("imagenet", "det", "seg")
EVERYTHING = "all"
ACCURACIES = ("top1", "top5")  # of a classifier
FORMS = {  # of texts that go into addresses, comparisons and names
    "url": r"https?://\S+",
    "drive_id": r"[\w-]+",
    "sha256": "[0-9A-Fa-f]{64}",
    "image_names": r"[^{}]*\{(:\d{1,2}d)?\}[^{}]*",
}
RELEASED = Path(__file__).with_name("zoo.json")

T = TypeVar("T", "Dataset", "Entry")


@dataclass(frozen=True, kw_only=True, slots=True)
class Dataset:
    """The images that published figures were measured on.

    Attributes:
        name: Its name in the file.
        title: Its name for people.
        num_images: Images of the whole set.
        num_classes: Its classes.
        tolerance: How far a measured figure may lie from the published one, in points.
        fingerprint: Hash of the set as the data loaders give it; empty where it is not known.
        images_per_class: Images of each class, where every class has as many.
        image_names: Names of the image files without their endings, given their numbers from 1.
        class_list: timm's name of the list of class names.
    """

    name: str
    title: str
    num_images: int
    num_classes: int
    tolerance: float
    fingerprint: str = ""
    images_per_class: int | None = None
    image_names: str = ""
    class_list: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One checkpoint.

    Attributes:
        name: What it is asked for by.
        task: ``imagenet`` (a classifier), ``det`` or ``seg``.
        dataset: What its figures were measured on.
        network: The variant whose entries it holds.
        path: Where it belongs, relative to the repository, or to the file that lists it.
        config: The config that tests it, relative to the repository.
        overrides: Overrides of that config.
        entries: For a detector or segmentor, the list of its entries outside the backbone.
        drive_id: Its file id on Google Drive.
        url: A direct link, preferred to the Drive.
        params: Parameters, as published.
        macs: Multiply-accumulates, as published.
        published: Figures in points, by name.
        also_known: Other values of a figure that its authors got from the same weights.
        in_table: A figure as the published table has it, where a log has it too.
        size: Bytes of the file, None where not published.
        sha256: Its checksum, empty where not published.
        folder: Folder of the file that lists it; None for a released checkpoint.
    """

    name: str
    task: str
    dataset: Dataset
    network: str
    path: str
    config: str
    published: Mapping[str, float]
    overrides: Sequence[str] = ()
    entries: str = ""
    drive_id: str = ""
    url: str = ""
    params: str = ""
    macs: str = ""
    also_known: Mapping[str, Sequence[float]] = field(default_factory=dict)
    in_table: Mapping[str, float] = field(default_factory=dict)
    size: int | None = None
    sha256: str = ""
    folder: Path | None = None


@functools.cache
def read_zoo(path: str | Path = RELEASED) -> Mapping[str, Entry]:
    """Return the checkpoints that a file lists, by name; the released ones by default.

    Raises:
        ValueError: If the file is missing or not of the form of ``zoo.json``.
    """
    path = Path(path)
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: no list of checkpoints can be read from it ({error})") from error
    if not isinstance(contents, dict) or not all(isinstance(contents.get(key), dict) for key in ("datasets", "models")):
        raise ValueError(f"{path}: expected an object with the objects 'datasets' and 'models', as {RELEASED} has them")
    try:
        return _read(contents, None if path == RELEASED else path.resolve().parent)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _read(contents: Mapping[str, Mapping[str, Any]], folder: Path | None) -> dict[str, Entry]:
    datasets = {name: _build(Dataset, name, values) for name, values in contents["datasets"].items()}
    models = {}
    for name, values in contents["models"].items():
        if isinstance(values, dict) and isinstance(dataset := values.get("dataset"), str):
            if dataset not in datasets:
                raise ValueError(f"{name} names the data set {dataset!r}, which is not listed")
            values = {**values, "dataset": datasets[dataset]}
        models[name] = _build(Entry, name, values, folder=folder)
    return models


def _build(kind: type[T], name: str, values: Any, **known: Any) -> T:
    """Make an entry of the values in a file, each of the type that its annotation says."""
    if not isinstance(values, dict):
        raise ValueError(f"{name} is {values!r}, expected an object")
    types = {key: wanted for key, wanted in get_type_hints(kind).items() if key not in ("name", *known)}
    for key, value in values.items():
        if key not in types:
            raise ValueError(f"{name} has an unknown key {key!r}; did you mean {_nearest(key, types)!r}?")
        if not fits(value, types[key]):
            raise ValueError(f"{name} has {key} {value!r}, expected {describe(types[key])}")
    try:
        entry = kind(name=name, **values, **known)
    except TypeError as error:  # which names the keys that are missing
        raise ValueError(f"{name}: {error}") from None
    _check(entry)
    return entry


def _check(entry: Dataset | Entry) -> None:
    check_path(entry.name, key="the name", is_name=True)
    for key, form in FORMS.items():
        value = getattr(entry, key, None)
        if value and not re.fullmatch(form, value):
            raise ValueError(f"{entry.name} has {key} {value!r}, expected {form}")
    if isinstance(entry, Dataset):
        return
    check_path(entry.path, key=f"{entry.name}: path")
    check_path(entry.config, key=f"{entry.name}: config")
    for key, value, choices in (("task", entry.task, TASKS), ("network", entry.network, VARIANTS)):
        if value not in choices:
            raise ValueError(f"{entry.name} has {key} {value!r}, expected one of {', '.join(choices)}")
    if (entry.task == "imagenet") == bool(entry.entries):
        raise ValueError(f"{entry.name}: 'entries' belongs to detectors and segmentors, and they need it")
    unknown = sorted(set(entry.published) - set(ACCURACIES)) if entry.task == "imagenet" else []
    if unknown:
        raise ValueError(f"{entry.name} has a published {unknown[0]!r}, expected {' or '.join(ACCURACIES)}")


def find(name: str, models: Mapping[str, Entry] | None = None) -> Entry:
    """Return the checkpoint of a name, in upper or lower case.

    Args:
        name: Such as ``mobilemamba_t2``, ``mobilemamba_t2s`` (the † model) or ``maskrcnn``.
        models: Where to look; the released ones when None.

    Raises:
        ValueError: If there is none; the nearest is named.
    """
    known = {entry.lower(): entry for entry in models or read_zoo()}
    if name.lower() not in known:
        raise ValueError(
            f"there is no released checkpoint {name!r}; the nearest is {_nearest(name.lower(), known)!r} "
            f"(known: {', '.join(known.values())})"
        )
    return (models or read_zoo())[known[name.lower()]]


def released_entry(network: str, pretrained: bool | str = True) -> Entry:
    """Return the checkpoint that ``create_model(network, pretrained=pretrained)`` loads.

    Args:
        network: A variant's name.
        pretrained: True for the variant's own, trained from the labels only, or the name of a checkpoint, such as
            ``mobilemamba_t2s`` for the distilled T2.

    Raises:
        ValueError: If there is no such checkpoint, or it is of another network.
    """
    entry = find(network if pretrained is True else str(pretrained))
    if entry.task != "imagenet" or entry.network.lower() != network.lower():
        kind = "a classifier" if entry.task == "imagenet" else "a detector or segmentor"
        fitting = [other.name for other in read_zoo().values() if _is_classifier_of(other, network)]
        raise ValueError(
            f"pretrained={pretrained!r} is {kind} with {entry.network}, not {network}: use {' or '.join(fitting)}"
        )
    return entry


def _is_classifier_of(entry: Entry, network: str) -> bool:
    return entry.task == "imagenet" and entry.network.lower() == network.lower()


def models_of(names: Iterable[str], models: Mapping[str, Entry] | None = None) -> list[Entry]:
    """Return the checkpoints of names, each once; ``all``, ``imagenet``, ``det`` and ``seg`` stand for several.

    Raises:
        ValueError: If a name is unknown.
    """
    models = models or read_zoo()
    chosen: dict[str, Entry] = {}
    for name in names:
        group = [entry for entry in models.values() if name in (EVERYTHING, entry.task)]
        chosen |= {entry.name: entry for entry in group or [find(name, models)]}
    return list(chosen.values())


def _nearest(name: str, known: Iterable[str]) -> str:
    return difflib.get_close_matches(name, list(known), n=1, cutoff=0.0)[0]
