"""Setuptools' build hooks, run against the PyTorch that is installed.

pip builds in an isolated environment, and would download a PyTorch for the build, perhaps another one than the kernels
will run with. So the environment's own packages are made visible again, behind the isolated ones.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import site
from typing import Any

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]


def _setuptools() -> Any:
    """Return setuptools' own hooks, with the installed packages visible."""
    _show_installed()
    from setuptools import build_meta

    return build_meta


def _show_installed() -> None:
    for folder in (*site.getsitepackages(), site.getusersitepackages()):
        site.addsitedir(folder)


def _requirements() -> list[str]:
    """Return the packages to download for the build: none where a setuptools that can make wheels is installed."""
    _show_installed()
    try:
        version = tuple(int(part) for part in importlib.metadata.version("setuptools").split(".")[:2])
    except importlib.metadata.PackageNotFoundError:
        version = (0, 0)
    can_make_wheels = version >= (70, 1) or (version >= (61, 0) and importlib.util.find_spec("wheel") is not None)
    return [] if can_make_wheels else ["setuptools>=70.1,<82"]


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    """See PEP 517."""
    return _requirements()


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    """See PEP 660."""
    return _requirements()


def get_requires_for_build_sdist(config_settings: Any = None) -> list[str]:
    """See PEP 517."""
    return _requirements()


def prepare_metadata_for_build_wheel(*arguments: Any, **options: Any) -> str:
    """See PEP 517."""
    return _setuptools().prepare_metadata_for_build_wheel(*arguments, **options)


def prepare_metadata_for_build_editable(*arguments: Any, **options: Any) -> str:
    """See PEP 660."""
    return _setuptools().prepare_metadata_for_build_editable(*arguments, **options)


def build_wheel(*arguments: Any, **options: Any) -> str:
    """See PEP 517."""
    return _setuptools().build_wheel(*arguments, **options)


def build_editable(*arguments: Any, **options: Any) -> str:
    """See PEP 660."""
    return _setuptools().build_editable(*arguments, **options)


def build_sdist(*arguments: Any, **options: Any) -> str:
    """See PEP 517."""
    return _setuptools().build_sdist(*arguments, **options)
