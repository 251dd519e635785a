"""The backends "cpu" and "cuda": C++ and CUDA C++, built from kernels/selective_scan into `mobilemamba_kernels`.

The library is found and loaded when a backend is first chosen. One that was built for another PyTorch is never
loaded: it would crash or, worse, compute something else.
"""

from __future__ import annotations

import functools
import importlib.util
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import layer_kernels

__all__ = ["CompiledBackend", "build_info", "cpu", "cuda", "load"]

PACKAGE = "mobilemamba_kernels"
BUILD = f"pip install {Path(__file__).resolve().parent / 'kernels' / 'selective_scan'}"
# Raised whenever the operators' schemas change, here and in setup.py: a library of another number is not used.
SCHEMA = 5


@functools.cache
def build_info() -> tuple[dict[str, Any], str]:
    """Return what setup.py wrote beside the library (empty if it is of no use), and why it is of no use."""
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
    layer_kernels.register_fakes()
    return True, f"{PACKAGE} {info['version']} for torch {info['torch']}"


class CompiledBackend:
    """The functions of the library for one type of device.

    Args:
        device_type: "cpu" or "cuda".
    """

    def __init__(self, device_type: str) -> None:
        self.device_type = device_type

    def is_available(self) -> tuple[bool, str]:
        """Return whether the library and the device are there, and the version or what is missing."""
        is_loaded, reason = load()
        if not is_loaded:
            return False, reason
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"{PACKAGE}::gated_scan", self.device_type.upper()):
            why = build_info()[0].get("without_cuda") or "unknown reason"
            return False, f"{PACKAGE} was built without {self.device_type.upper()} ({why}): build it again ({BUILD})"
        if self.device_type == "cpu":
            return True, f"{reason}, {torch.ops.mobilemamba_kernels.cpu_capability()}"
        if not torch.cuda.is_available():
            return False, "PyTorch finds no CUDA device"
        return True, reason

    def gated_scan(self, x: Tensor, *arguments: Any) -> Tensor:
        """Run the operator; NotImplemented for a type that the kernel is not made for."""
        if not self._covers(x):
            return NotImplemented
        return torch.ops.mobilemamba_kernels.gated_scan(x, *arguments)

    def gated_scan_backward(self, grad: Tensor, x: Tensor, *arguments: Any) -> Any:
        """Run the operator likewise."""
        if not self._covers(x):
            return NotImplemented
        return torch.ops.mobilemamba_kernels.gated_scan_backward(grad, x, *arguments)

    def selective_scan(self, x: Tensor, *arguments: Any) -> Tensor:
        """Run the operator likewise."""
        if not self._covers(x):
            return NotImplemented
        return torch.ops.mobilemamba_kernels.selective_scan(x, *arguments)

    def selective_scan_backward(self, grad: Tensor, x: Tensor, *arguments: Any) -> Any:
        """Run the operator likewise."""
        if not self._covers(x):
            return NotImplemented
        return torch.ops.mobilemamba_kernels.selective_scan_backward(grad, x, *arguments)

    def _covers(self, x: Tensor) -> bool:
        return x.dtype in _DTYPES[self.device_type]


_DTYPES = {
    "cpu": (torch.float32, torch.bfloat16),
    "cuda": (torch.float32, torch.float16, torch.bfloat16),
}
cpu = CompiledBackend("cpu")
cuda = CompiledBackend("cuda")
