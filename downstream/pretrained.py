"""ImageNet weights for a backbone: the released ones, a checkpoint's entries for it, and whether they fit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from mmengine.logging import print_log
from torch import Tensor, nn

from model import variant_shapes
from model.checkpoint import select_state_dict
from model.mismatch import compare, explain
from model.zoo import DownloadError, fetch, released_entry

from .loading import load_local_checkpoint

__all__ = ["FAMILY", "INSIDE_MODEL", "backbone_entries", "check_backbone", "load_pretrained", "released_checkpoint"]

FAMILY = "MobileMamba_"
HEADS = ("head", "head_dist")
INSIDE_MODEL = "backbone."  # before a backbone's entries in a detector, segmentor or classifier of OpenMMLab


def released_checkpoint(variant: str) -> Path:
    """Return the released ImageNet checkpoint of a variant, downloaded if need be, and verified.

    Raises:
        OSError: It cannot be downloaded.
        ValueError: The file is not the released one.
    """
    try:
        return fetch(released_entry(variant))
    except OSError as error:
        raise DownloadError(
            f"{error}; or name another file with model.backbone.pretrained=PATH, or start from random weights with "
            "model.backbone.pretrained=False"
        ) from error


def load_pretrained(backbone: nn.Module, path: Path, *, ema: bool = False) -> list[str]:
    """Load a checkpoint's weights into a backbone, all entries of it; entries left over are logged.

    Args:
        backbone: MobileMamba without a classifier.
        path: An ImageNet checkpoint, or one of a whole model of OpenMMLab, whose entries under ``backbone.`` are taken.
        ema: Take the averaged weights out of it.

    Returns:
        The entries of the file left over, those of its head.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file cannot be read, holds no weights, or not exactly the backbone's.
    """
    entries, source = select_state_dict(load_local_checkpoint(path), ema=ema, origin=path)
    is_inside = any(entry.startswith(INSIDE_MODEL) for entry in entries)
    weights = backbone_entries(entries) if is_inside else _without_heads(entries)
    left_over = [entry for entry in entries if entry.removeprefix(INSIDE_MODEL if is_inside else "") not in weights]
    check_backbone(weights, backbone.state_dict(), source=source, title=f"{path} ({source}) does not fit the backbone.")
    backbone.load_state_dict(weights)
    rest = f"left over {len(left_over)}: {', '.join(left_over)}" if left_over else "nothing left over"
    print_log(f"{path}: loaded {len(weights)} entries of {source} into the backbone, {rest}", logger="current")
    return left_over


def backbone_entries(entries: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what a whole model's entries hold of its backbone, by the backbone's own names."""
    inside = {entry: value for entry, value in entries.items() if entry.startswith(INSIDE_MODEL)}
    return {entry.removeprefix(INSIDE_MODEL): value for entry, value in inside.items()}


def _without_heads(entries: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {entry: value for entry, value in entries.items() if entry.split(".", 1)[0] not in HEADS}


def check_backbone(weights: Mapping[str, Tensor], own: Mapping[str, Tensor], *, source: str, title: str) -> None:
    """Raise a ValueError, whose first line is ``title``, where weights are not exactly a backbone's."""
    report = compare(weights, own, source=source)
    if not report.fits:
        reasons = explain(report, weights, own, heads=HEADS, variants=_variants, entry="model.backbone.variant")
        raise ValueError("\n  ".join([title, *reasons]))


def _variants() -> dict[str, dict]:
    """Return the shapes of every variant's entries, by the names that configurations use."""
    return {variant.removeprefix(FAMILY): shapes for variant, shapes in variant_shapes().items()}
