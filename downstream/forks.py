"""OpenMMLab's maintained forks: the same modules under other package names."""

from __future__ import annotations

import importlib.metadata
import importlib.util

__all__ = ["find_forks", "leave_out_language_models"]


def find_forks() -> None:
    """Let configurations inherit from ``mmseg::`` where mmseg comes from its fork.

    mmengine looks for the package mmsegmentation, and does not know it as onedl-mmsegmentation. It finds
    mmdet and mmpretrain by their modules, which have the names of the packages.
    """
    if importlib.util.find_spec("mmengine") is None:
        return
    from mmengine.config.utils import MODULE2PACKAGE

    try:
        importlib.metadata.version(MODULE2PACKAGE["mmseg"])
    except importlib.metadata.PackageNotFoundError:
        MODULE2PACKAGE["mmseg"] = "mmseg"


def leave_out_language_models() -> None:
    """Let mmpretrain, and mmdet with it, be imported beside transformers 5, without mmpretrain's language models.

    These take names that transformers 5 no longer has, and are offered wherever there is a transformers.
    """
    try:
        major = int(importlib.metadata.version("transformers").partition(".")[0])
    except importlib.metadata.PackageNotFoundError:
        return
    # mmpretrain cannot be imported without the other two, as while mmcv is being built.
    if major < 5 or any(importlib.util.find_spec(name) is None for name in ("mmengine", "mmcv", "mmpretrain")):
        return
    from mmpretrain.utils import dependency

    dependency.WITH_MULTIMODAL = False
