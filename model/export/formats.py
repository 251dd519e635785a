"""The formats, by name: a module each, with the same parts."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from . import onnx_format, openvino_format
from .portable import Form
from .request import ExportRequest, Runner

__all__ = ["FORMATS", "Format", "require"]


class Format(Protocol):
    """What the module of a format offers. It imports the format's packages where it uses them, not at its top."""

    SUFFIX: str  # of its file
    COMPANIONS: tuple[str, ...]  # suffixes of what else is written beside it
    EXTRA: str  # what installs the packages: ``pip install mobilemamba[EXTRA]``
    PACKAGES: tuple[str, ...]  # modules that writing and running need
    FORM: Form  # what its runtime takes best

    def write(self, network: nn.Module, request: ExportRequest, path: Path) -> None:
        """Write a network, in portable form and with what stands before and behind it."""

    def load(self, path: Path) -> Runner | None:
        """Return what runs the file in the format's own runtime; None where that does not exist for this system."""


FORMATS: dict[str, Any] = {
    "onnx": onnx_format,
    "openvino": openvino_format,
}


def require(name: str) -> Format:
    """Return a format whose packages are installed.

    Raises:
        ValueError: If there is no such format.
        ModuleNotFoundError: If a package is missing; the extra that brings it is named.
    """
    if name not in FORMATS:
        raise ValueError(f"there is no format {name!r}; known: {', '.join(FORMATS)}")
    chosen: Format = FORMATS[name]
    missing = [package for package in chosen.PACKAGES if importlib.util.find_spec(package) is None]
    if missing:
        raise ModuleNotFoundError(
            f"the format {name} needs {', '.join(missing)}: pip install 'mobilemamba[{chosen.EXTRA}]', "
            f"or pip install {' '.join(missing)}"
        )
    return chosen
