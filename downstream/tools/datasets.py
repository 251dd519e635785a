"""Checks, before anything slow, that a configuration's data sets are there and have its classes.

`downstream.hooks.ClassCountHook` checks that the model has these classes too.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmengine.config import Config

from downstream.data.check import label_problem
from model.messages import listed

from .errors import InputError
from .settings import layout_hint, loader_datasets, registered

__all__ = ["check_datasets", "classes_of"]

NUM_LABEL_MAPS = 8  # looked into, evenly spread; the check command reads all
REDUCED = ("ADE20KDataset",)  # label 0 means no class


def check_datasets(config: Config, *splits: str) -> None:
    """Check what the loaders and evaluators of some splits read.

    Args:
        config: The whole configuration.
        splits: ``train``, ``val``, ``test``.

    Raises:
        InputError: A file or folder is missing, or its classes are not the data set's.
    """
    for split in splits:
        for entry, dataset in loader_datasets(config, f"{split}_dataloader"):
            _check_paths(entry, dataset, config)
            _check_classes(entry, dataset, config.get("default_scope", "mmengine"))
        _check_evaluator(config, split)


def classes_of(dataset: Mapping[str, Any], scope: str) -> Sequence[str] | None:
    """Return the class names of a data set's configuration: its own, or its type's; None where neither says."""
    metainfo = dataset.get("metainfo") or {}
    if metainfo.get("classes"):
        classes = metainfo["classes"]
        return (classes,) if isinstance(classes, str) else classes
    known = getattr(registered(dataset["type"], scope), "METAINFO", {})
    return known.get("classes")


def _check_paths(entry: str, dataset: Mapping[str, Any], config: Config) -> None:
    root = Path(dataset.get("data_root") or "")
    prefix = dataset.get("data_prefix") or {}
    folders = prefix.items() if isinstance(prefix, Mapping) else [("", prefix)]
    wanted = {f"data_prefix.{key}".rstrip("."): root / path for key, path in folders if path}
    if dataset.get("ann_file"):
        wanted["ann_file"] = root / dataset["ann_file"]
    absent = [f"{path} ({entry}.{key})" for key, path in wanted.items() if not path.exists()]
    if absent:
        raise InputError(f"missing: {', '.join(absent)}; {layout_hint(config)}")


def _check_classes(entry: str, dataset: Mapping[str, Any], scope: str) -> None:
    classes = classes_of(dataset, scope)
    if classes is None:
        return
    if str(dataset.get("ann_file", "")).endswith(".json"):
        _check_categories(entry, dataset, classes)
    elif dataset["type"] in REDUCED and not dataset.get("metainfo"):
        _check_labels(Path(dataset.get("data_root") or "", dataset["data_prefix"]["seg_map_path"]), len(classes))


def _check_categories(entry: str, dataset: Mapping[str, Any], classes: Sequence[str]) -> None:
    path = Path(dataset.get("data_root") or "", dataset["ann_file"])
    found = [category["name"] for category in read_categories(path)]
    lacking = [name for name in classes if name not in found]
    extra = [] if dataset.get("metainfo") else [name for name in found if name not in classes]
    if not lacking and not extra:
        return
    reasons = [f"{title} {listed(names)}" for title, names in (("it lacks", lacking), ("unknown are", extra)) if names]
    raise InputError(
        f"{path} has {len(found)} categories ({listed(found)}), {entry} expects {len(classes)} ({listed(classes)}): "
        f"{', '.join(reasons)}. For classes of your own, set num_classes={len(found)} in the model's heads and "
        f"metainfo.classes in {entry} and its like"
    )


def read_categories(path: Path) -> list[dict[str, Any]]:
    """Return the categories of a COCO annotation file; of half a gigabyte, as COCO's is, only these are parsed.

    Raises:
        InputError: The file is no JSON of COCO's kind, or is truncated.
    """
    key = b'"categories"'
    with path.open("rb") as file:
        if path.stat().st_size == 0:
            raise InputError(f"{path} is empty: get it again")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
            start = text.rfind(key)
            is_whole = text[-64:].rstrip().endswith(b"}")
            rest = text[start + len(key) :].decode(errors="replace").lstrip(" \t\r\n:") if start >= 0 else ""
    try:
        categories, _ = json.JSONDecoder().raw_decode(rest)
        if is_whole and all("name" in category for category in categories):
            return list(categories)
    except (ValueError, TypeError):
        pass
    raise InputError(f"{path} is no annotation file of COCO's kind, or truncated: it has no whole list of categories")


def _check_labels(folder: Path, num_classes: int) -> None:
    paths = sorted(folder.rglob("*.png"))
    if not paths:
        raise InputError(f"{folder} holds no label maps (*.png)")
    for path in paths[:: max(len(paths) // NUM_LABEL_MAPS, 1)]:
        problem = label_problem(path, num_classes=num_classes)
        if problem:
            raise InputError(f"{folder}: {problem}; `python -m downstream.data check ade20k FOLDER` reads all of them")


def _check_evaluator(config: Config, split: str) -> None:
    """Check that detections are compared with the annotations of the images that they are made on."""
    evaluator = config.get(f"{split}_evaluator")
    if not isinstance(evaluator, Mapping) or not evaluator.get("ann_file"):
        return
    path = Path(evaluator["ann_file"])
    if not path.is_file():
        raise InputError(f"missing: {path} ({split}_evaluator.ann_file); {layout_hint(config)}")
    for entry, dataset in loader_datasets(config, f"{split}_dataloader"):
        own = Path(dataset.get("data_root") or "", dataset["ann_file"])
        if own.resolve() != path.resolve():
            raise InputError(
                f"{split}_evaluator.ann_file is {path}, but {entry} reads {own}: set both to the same, or --data-root"
            )
