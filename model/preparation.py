"""How a network's images are prepared for its test: noted in checkpoints, in the words of timm's ``default_cfg``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from torch import nn

__all__ = ["ENTRY", "INTERPOLATIONS", "describe_steps", "note_preparation", "read_preparation"]

ENTRY = "test_transform"  # of a checkpoint
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")  # Pillow's
CONFIG = "config.yaml"


def describe_steps(steps: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what a run's test pipeline does, as far as its steps tell.

    Args:
        steps: As a configuration lists them: mappings with a ``type`` (Resize, CenterCrop, Normalize) and its values.

    Returns:
        ``size`` (height and width, pixels), ``crop_pct`` (share of the shorter side that is seen), ``interpolation``,
        ``mean`` and ``std`` (of pixels from 0 to 1, one a channel).
    """
    by_type = {step.get("type"): step for step in steps if isinstance(step, Mapping)}
    resize, crop, normalize = (by_type.get(name, {}) for name in ("Resize", "CenterCrop", "Normalize"))
    found: dict[str, Any] = {name: list(normalize[name]) for name in ("mean", "std") if normalize.get(name)}
    side = crop.get("size") or resize.get("size")
    if side:
        found["size"] = [side, side]
    if resize.get("interpolation"):
        found["interpolation"] = resize["interpolation"]
    if side and resize.get("size"):
        found["crop_pct"] = _crop_pct(side, resize)
    return found


def _crop_pct(side: int, resize: Mapping[str, Any]) -> float:
    """Return the share that a crop leaves: the configured one where the resized side follows from it."""
    configured = resize.get("crop_pct")
    if configured and int(side / configured) == resize["size"]:
        return float(configured)
    return min(1.0, side / resize["size"])


def read_preparation(checkpoint: Mapping[str, Any], path: str | Path) -> dict[str, Any]:
    """Return what a checkpoint tells of its network's test transform; nothing where it tells nothing.

    A checkpoint of an older run has its configuration inside, or beside it as ``config.yaml``.

    Args:
        checkpoint: Its entries.
        path: Its file.

    Raises:
        ValueError: If what it tells cannot be.
    """
    noted = checkpoint.get(ENTRY)
    if noted is None:
        config = checkpoint.get("config") or _config_beside(Path(path))
        data = config.get("data") if isinstance(config, Mapping) else None
        steps = data.get("test_transforms") if isinstance(data, Mapping) else None
        try:
            noted = describe_steps(steps or [])
        except (TypeError, ValueError):  # a file of that name that is something else
            noted = {}
    _check(noted, path)
    return dict(noted)


def _config_beside(path: Path) -> Any:
    """Return a run's configuration; None where there is none, or a file that is something else."""
    try:
        return yaml.safe_load((path.parent / CONFIG).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, RecursionError, yaml.YAMLError):
        return None


def _check(noted: Any, path: str | Path) -> None:
    checks = {
        "size": lambda value: len(value) == 2 and all(isinstance(side, int) and side > 0 for side in value),
        "mean": lambda value: len(value) > 0 and all(math.isfinite(each) for each in value),
        "std": lambda value: len(value) > 0 and all(0 < each < math.inf for each in value),
        "crop_pct": lambda value: 0 < value <= 1,
        "interpolation": lambda value: value in INTERPOLATIONS,
    }
    if not isinstance(noted, Mapping):
        raise ValueError(f"{path}: its {ENTRY} is a {type(noted).__name__}, not a mapping: remove the entry")
    for name, value in noted.items():
        try:
            fits = name not in checks or checks[name](value)
        except TypeError:
            fits = False
        if not fits:
            raise ValueError(f"{path}: its {ENTRY} has {name} {value!r}, which cannot be: mend or remove the entry")


def note_preparation(network: nn.Module, noted: Mapping[str, Any]) -> None:
    """Put a test transform into the record that timm, transformers and `model.export` prepare images by.

    Args:
        network: Has timm's ``default_cfg``; one without is left alone.
        noted: From `read_preparation`.
    """
    cfg = getattr(network, "default_cfg", None)
    if not cfg or not noted:
        return
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in noted.items()}
    if size := values.pop("size", None):
        values["input_size"] = (cfg["input_size"][0], *size)
    network.default_cfg = {**cfg, **values}  # type: ignore[assignment]
    network.pretrained_cfg = network.default_cfg
