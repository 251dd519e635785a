"""The compiled library `mobilemamba_kernels`: find it, load it, and tell tracers the shapes that its operators return.

It is built from kernels/selective_scan and loaded when it is first needed. One that was built for another PyTorch is
never loaded: it would crash or, worse, compute something else.
"""

from __future__ import annotations

import functools
import importlib.util
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["BUILD", "PACKAGE", "build_info", "has_kernel", "load"]

PACKAGE = "mobilemamba_kernels"
BUILD = f"pip install {Path(__file__).resolve().parent / 'kernels' / 'selective_scan'}"
# Raised whenever the operators' schemas change, here and in setup.py: a library with another number is not used.
SCHEMA = 6


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
    if info["schema"] != SCHEMA:
        return {}, f"{PACKAGE} is of another version of MobileMamba: build it again ({BUILD})"
    return {**info, "path": str(library)}, ""


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
    _register_fakes()
    return True, f"{PACKAGE} {info['version']} for torch {info['torch']}"


def has_kernel(operator: str, device_type: str) -> bool:
    """Return whether the loaded library implements an operator for a type of device."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"{PACKAGE}::{operator}", device_type)


def _register_fakes() -> None:
    """Register the shapes of the results for torch.compile. Once: another copy of this package may have done so."""
    for name, fake in _FAKES.items():
        if not has_kernel(name, "Meta"):
            torch.library.register_fake(f"{PACKAGE}::{name}", fake)


def _new_map(x: Tensor, channels: int, height: Any, width: Any) -> Tensor:
    return x.new_empty((x.shape[0], channels, height, width)).contiguous(memory_format=torch.channels_last)


def _convolved(x: Tensor, channels: int, side: int, stride: int, padding: int) -> Tensor:
    height, width = ((size + 2 * padding - side) // stride + 1 for size in x.shape[2:])
    return _new_map(x, channels, height, width)


def _pointwise(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, activation: int) -> Tensor:
    return _new_map(x, bias.shape[0], *x.shape[2:])


def _ffn(x: Tensor, *weights: Tensor | None) -> Tensor:
    return _new_map(x, *x.shape[1:])


def _convs(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], side: int, stride: int, padding: int
) -> Tensor:
    for bias in biases:
        x = _convolved(x, bias.shape[0], side, stride, padding)
    return x


def _depthwise(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    stride: int,
    padding: int,
    activation: int,
) -> Tensor:
    return _convolved(x, x.shape[1], weight.shape[0], stride, padding)


def _wavelet(x: Tensor, weight: Tensor, base: Tensor) -> Tensor:
    return _new_map(x, *x.shape[1:])


_FAKES: dict[str, Callable[..., Tensor]] = {
    "pointwise": _pointwise,
    "ffn": _ffn,
    "convs": _convs,
    "depthwise": _depthwise,
    "wavelet": _wavelet,
}
