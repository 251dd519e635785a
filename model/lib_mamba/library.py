"""The compiled library `mobilemamba_kernels`: find it and load it.

It is built from kernels/selective_scan and loaded when it is first needed. One that was built for another PyTorch, or
from other schemas of the operators, is never loaded: it would crash or, worse, compute something else.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
from pathlib import Path
from typing import Any

import torch

__all__ = ["BUILD", "PACKAGE", "build_info", "cuda_errors", "fingerprint", "has_kernel", "load"]

PACKAGE = "mobilemamba_kernels"
SOURCES = Path(__file__).resolve().parent / "kernels" / "selective_scan"
BUILD = f"pip install {SOURCES}"


def fingerprint() -> str:
    """Return what tells the schemas of the operators from those of another version, as setup.py computes it."""
    return hashlib.sha256((SOURCES / "csrc" / "operators.cpp").read_bytes()).hexdigest()


@functools.cache
def build_info() -> tuple[dict[str, Any], str]:
    """Return what setup.py wrote beside the library (empty if it is unusable), and why it is unusable."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        return {}, f"{PACKAGE} is not installed ({BUILD})"
    folder = Path(spec.submodule_search_locations[0])
    try:
        info = json.loads((folder / "build.json").read_text())
        library = next(folder.glob(info["library"]))
    except (OSError, ValueError, KeyError, StopIteration):
        return {}, f"{PACKAGE} in {folder} is incomplete: build it again ({BUILD})"
    running = torch.__version__.split("+")[0]
    if info["torch"] != running:
        return {}, f"{PACKAGE} was built for torch {info['torch']}, this is {running}: build it again ({BUILD})"
    if info.get("schemas") != fingerprint():
        return {}, f"{PACKAGE} is of another version of MobileMamba: build it again ({BUILD})"
    return {**info, "path": str(library)}, ""


def cuda_errors() -> list[str]:
    """Return why the library was built without CUDA though nvcc was there: the compiler's errors, say; else nothing."""
    return build_info()[0].get("cuda_errors", [])


@functools.cache
def load() -> tuple[bool, str]:
    """Load the library; return whether it is there, and its version or why not."""
    info, problem = build_info()
    if problem:
        return False, problem
    try:
        torch.ops.load_library(info["path"])
    except OSError as error:
        return False, f"{PACKAGE} does not load, build it again ({BUILD}): {error}"
    return True, f"{PACKAGE} {info['version']} for torch {info['torch']}"


def has_kernel(operator: str, device_type: str) -> bool:
    """Return whether the loaded library implements an operator for a type of device."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"{PACKAGE}::{operator}", device_type)
