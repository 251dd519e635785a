"""A network to a file of another runtime, checked: `export`."""

from __future__ import annotations

import copy
import logging
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import nn

from .check import Report, compare, read_images, size_on_disk
from .deployed import Deployed
from .formats import require
from .portable import portable
from .request import ExportRequest
from .sources import bare_network

__all__ = ["default_request", "export"]

logger = logging.getLogger(__name__)

NUM_MADE_UP = 8


def default_request(network: nn.Module, **options: Any) -> ExportRequest:
    """Return a request with what the network's timm configuration says of size, normalisation, crop and interpolation.

    Args:
        network: The network.
        **options: Attributes of `ExportRequest`; they take precedence. A single mean or deviation is for all channels.

    Raises:
        ValueError: If options contradict each other, or there are not as many means as channels.
    """
    inner = bare_network(network)
    cfg = inner.default_cfg
    channels = inner.in_chans
    known: dict[str, Any] = {"size": (inner.img_size, inner.img_size)}
    if cfg:
        known["size"] = tuple(cfg["input_size"][1:])
        known["crop_pct"] = cfg["crop_pct"]
        known["interpolation"] = cfg["interpolation"]
    for name, default in (("mean", IMAGENET_DEFAULT_MEAN), ("std", IMAGENET_DEFAULT_STD)):
        values = tuple(cfg.get(name, default))
        known[name] = values if len(values) == channels else (sum(values) / len(values),) * channels
        if len(given := options.get(name, ())) == 1:
            options[name] = tuple(given) * channels
        elif given and len(given) != channels:
            raise ValueError(f"{name} {tuple(given)} must have one number, or one for each of {channels} channels")
    return ExportRequest(**{**known, **options})


def export(
    network: nn.Module,
    path: str | Path,
    *,
    format: str = "onnx",
    overwrite: bool = False,
    request: ExportRequest | None = None,
    images: Sequence[np.ndarray] | None = None,
    labels: Sequence[int] | None = None,
    **options: Any,
) -> Report:
    """Write a network in a format of `FORMATS`, then run the file beside PyTorch.

    Args:
        network: A MobileMamba, or one in timm's ``features_only``; it stays as it is.
        path: The file to write.
        format: Its format.
        overwrite: Replace the file if it exists.
        request: What is wanted; by default what `default_request` makes of the network and of ``options``.
        images: To compare with, as the file takes them, each with a batch dimension; made up when None.
        labels: Classes of the images, where they are known.
        **options: Attributes of `ExportRequest`.

    Returns:
        How the file's answers compare with PyTorch's.

    Raises:
        ValueError: If the format is unknown, or options contradict each other.
        ModuleNotFoundError: If a package of the format is missing.
        FileNotFoundError: If there is no folder for the file.
        FileExistsError: If the file exists and ``overwrite`` is not set.
    """
    chosen = require(format)
    path = Path(path)
    _check_path(path, format, chosen.SUFFIX, overwrite=overwrite)
    inner = copy.deepcopy(bare_network(network)).eval().cpu().float()
    if request is None:
        request = default_request(inner, **options)
    logger.info("%s: the network in portable form", path.name)
    size = None if request.dynamic_size else request.size
    deployed = Deployed(portable(inner, chosen.FORM, size), request).eval()
    logger.info("%s: writing %s", path.name, format)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as aside, torch.no_grad():
        chosen.write(deployed, request, Path(aside) / path.name)
        files = [_move(file, path.parent) for file in Path(aside).iterdir()]
    run = chosen.load(path)
    if run is None:
        return Report(num_bytes=size_on_disk(files))
    logger.info("%s: running it beside PyTorch", path.name)
    if images is None:
        images = read_images(request, [], num_made_up=NUM_MADE_UP)
    return compare(run, Deployed(inner, request).eval(), request, images, num_bytes=size_on_disk(files), labels=labels)


def _check_path(path: Path, format: str, suffix: str, *, overwrite: bool) -> None:
    if path.suffix != suffix:
        raise ValueError(f"{path}: the name of a file of the format {format} has to end in {suffix}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {path.parent} for {path.name}: make it first")
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists and was left as it is: name another file, or overwrite it (--overwrite)")


def _move(source: Path, folder: Path) -> Path:
    """Move a file or a folder into a folder of the same disk, in place of one of that name."""
    target = folder / source.name
    if target.is_dir():
        shutil.rmtree(target)
    return source.replace(target)
