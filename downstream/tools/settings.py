"""Reading a configuration, and overriding it with every misspelt entry refused."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import inspect
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import mmengine.registry
from mmengine.config import Config
from mmengine.registry import Registry
from mmengine.runner import Runner
from torch.utils.data import DataLoader

from .errors import InputError

__all__ = ["check_local", "layout_hint", "load_config", "load_run", "loader_datasets", "registered", "set_data_root"]

LOADERS = ("train_dataloader", "val_dataloader", "test_dataloader")
EVALUATORS = ("val_evaluator", "test_evaluator")

# Entries that a configuration may gain: what the runner and its loaders take.
RUN_ENTRIES = {
    *inspect.signature(Runner.__init__).parameters,
    *("find_unused_parameters", "sync_bn", "model_wrapper_cfg", "compile", "tta_model", "tta_pipeline"),
}
LOADER_ENTRIES = {*inspect.signature(DataLoader.__init__).parameters, "num_batch_per_epoch"}


def load_config(path: str, options: Mapping[str, Any], *, data_root: str | None = None) -> Config:
    """Read a configuration file and apply overrides.

    Args:
        path: With or without ``.py``.
        options: Dotted entry -> value.
        data_root: Folder of the data set; None leaves what the configuration says.

    Raises:
        InputError: The file is missing or broken, or an option names no entry.
    """
    try:
        config = Config.fromfile(_find(path))
    except ImportError as error:
        raise InputError(f"the configuration {path} cannot be read: {_import_cause(error)}") from error
    except (OSError, SyntaxError) as error:
        raise InputError(f"the configuration {path} cannot be read: {error}") from error
    if data_root is not None:
        set_data_root(config, data_root)
    _check_options(config, options)
    try:
        config.merge_from_dict(dict(options))
    except (KeyError, TypeError) as error:
        raise InputError(f"--cfg-options {' '.join(options)} does not fit {path}: {error}") from error
    return config


def load_run(parsed: argparse.Namespace) -> Config:
    """Read the configuration that a command line of training or testing names, and settle its work folder.

    Raises:
        InputError: See `load_config`.
    """
    config = load_config(parsed.config, parsed.cfg_options, data_root=parsed.data_root)
    config.work_dir = parsed.work_dir or config.get("work_dir") or str(Path("work_dirs", Path(config.filename).stem))
    return config


def _import_cause(error: ImportError) -> str:
    """Return why a module could not be imported; mmengine only says to set PYTHONPATH."""
    links: list[BaseException] = [error]
    while (link := links[-1].__cause__ or links[-1].__context__) is not None:
        links.append(link)
    # mmengine names the module in the second link, where it is one of custom_imports.
    steps = [str(link) for link in links if str(link).startswith("Failed to import ") and link is not error]
    return ": ".join((*steps, f"{type(links[-1]).__name__}: {links[-1]}"))


def _find(path: str) -> Path:
    given = Path(path)
    for candidate in (given, given.with_name(given.name + ".py")):
        if candidate.is_file():
            return candidate
    files = sorted(given.parent.glob("*.py")) if given.parent.is_dir() else []
    near = difflib.get_close_matches(given.name, [file.name for file in files], n=1, cutoff=0.0)
    hint = f"the nearest next to it: {near[0]}" if near else f"there is nothing in {given.parent} either"
    raise InputError(f"no configuration at {path}; {hint}")


def check_local(checkpoint: str | None) -> None:
    """Refuse a link: mmengine reads what it downloads in a way that runs what is in it.

    Raises:
        InputError: It is a link.
    """
    if checkpoint is not None and "://" in checkpoint:
        raise InputError(f"{checkpoint} is not on this machine: download it and give the file")


def loader_datasets(config: Config, loader: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the data sets of a loader as (dotted entry, configuration); of wrappers, those inside."""
    if config.get(loader):
        yield from _unwrapped(f"{loader}.dataset", config[loader].dataset)


def _unwrapped(entry: str, dataset: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    if "dataset" in dataset:
        yield from _unwrapped(f"{entry}.dataset", dataset["dataset"])
    elif "datasets" in dataset:
        for index, part in enumerate(dataset["datasets"]):
            yield from _unwrapped(f"{entry}.datasets.{index}", part)
    else:
        yield entry, dataset


def set_data_root(config: Config, data_root: str) -> None:
    """Let every data set and every evaluator read from another folder.

    Raises:
        InputError: There is no such folder.
    """
    if not Path(data_root).is_dir():
        raise InputError(f"--data-root {data_root} is not a folder: {layout_hint(config)}")
    for loader in LOADERS:
        for _, dataset in loader_datasets(config, loader):
            dataset["data_root"] = data_root
    for name in EVALUATORS:
        evaluator = config.get(name)
        if isinstance(evaluator, Mapping) and evaluator.get("ann_file"):
            evaluator["ann_file"] = str(Path(data_root, "annotations", Path(evaluator["ann_file"]).name))


def layout_hint(config: Config) -> str:
    """Return what to do about a data set that is not where it is looked for."""
    name = {"mmdet": "coco", "mmseg": "ade20k"}.get(config.get("default_scope", ""))
    if name is None:
        return "give its place with --data-root"
    return (
        "give its place with --data-root; from the repository's root, `python -m downstream.data check "
        f"{name} FOLDER` says what a folder lacks and `python -m downstream.data make {name} FOLDER` writes a tiny one"
    )


def registered(kind: str, scope: str) -> Any | None:
    """Return the class that a configuration calls by a name, or None."""
    for registry in vars(mmengine.registry).values():
        for name in (f"{scope}.{kind}", kind):
            with contextlib.suppress(RuntimeError, AttributeError):  # a name with dots that is no module's
                if isinstance(registry, Registry) and (found := registry.get(name)) is not None:
                    return found
    return None


def _check_options(config: Config, options: Mapping[str, Any]) -> None:
    scope = config.get("default_scope", "mmengine")
    for option in options:
        node: Any = config.to_dict()
        parts = option.split(".")
        for position, part in enumerate(parts):
            trail = ".".join(parts[:position]) or "the configuration"
            if isinstance(node, Mapping) and part not in node:
                _check_new(part, node, option, owner=parts[position - 1] if position else "", scope=scope)
                break
            if isinstance(node, Sequence) and not isinstance(node, str):
                if not part.isdigit() or int(part) >= len(node):
                    raise InputError(f"--cfg-options {option}: {trail} is a list of {len(node)}; give a number below")
                node = node[int(part)]
            elif isinstance(node, Mapping):
                node = node[part]
            elif node is not None:
                raise InputError(f"--cfg-options {option}: {trail} is {node!r} and has no entries")


def _check_new(part: str, node: Mapping[str, Any], option: str, *, owner: str, scope: str) -> None:
    """Check an entry that the configuration does not have yet against what its owner takes."""
    if not owner:
        known: Collection[str] | None = RUN_ENTRIES
    elif owner in LOADERS:
        known = LOADER_ENTRIES
    else:
        known = _accepted(node["type"], scope) if "type" in node else None
    near = difflib.get_close_matches(part, {*node, *(known or ())}, n=1)
    if known is not None and part not in known:
        hint = f"; the nearest is {near[0]}" if near else ""
        raise InputError(f"--cfg-options {option}: there is no entry {part}{hint}")
    if known is None and near:
        print(f"warning: --cfg-options {option} adds {part} next to {near[0]}", file=sys.stderr)


def _accepted(kind: Any, scope: str) -> set[str] | None:
    """Return the arguments of what a configuration builds, or None where it passes any on."""
    built = registered(kind, scope) if isinstance(kind, str) else kind
    if built is None:
        return None
    parameters = inspect.signature(built).parameters
    is_open = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    return None if is_open else {*parameters, "type", "init_cfg"}
