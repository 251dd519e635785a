"""OpenMMLab's maintained forks: the same modules under other package names."""

from __future__ import annotations

import importlib.metadata
import importlib.util

__all__ = ["find_forks"]


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
