"""The backends "cpu" and "cuda": the scans of the compiled library, C++ and CUDA C++."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .library import BUILD, PACKAGE, build_info, has_kernel, load

__all__ = ["CompiledBackend", "cpu", "cuda"]


class CompiledBackend:
    """The functions of the library for one type of device.

    Args:
        device_type: "cpu" or "cuda".
        dtypes: Types of ``x`` that the kernels are made for.
    """

    def __init__(self, device_type: str, dtypes: tuple[torch.dtype, ...]) -> None:
        self.device_type = device_type
        self.dtypes = dtypes

    def is_available(self) -> tuple[bool, str]:
        """Return whether the library and the device are there, and the version or what is missing."""
        is_loaded, reason = load()
        if not is_loaded:
            return False, reason
        if not has_kernel("gated_scan", self.device_type.upper()):
            why = build_info()[0].get("without_cuda") or "unknown reason"
            return False, f"{PACKAGE} was built without {self.device_type.upper()} ({why}): build it again ({BUILD})"
        if self.device_type == "cpu":
            return True, f"{reason}, {torch.ops.mobilemamba_kernels.cpu_capability()}"
        if not torch.cuda.is_available():
            return False, "PyTorch finds no CUDA device"
        return True, reason

    def gated_scan(self, x: Tensor, *arguments: Any) -> Tensor:
        """Run the operator; NotImplemented for a type of ``x`` that the kernel is not made for."""
        return self._run("gated_scan", x, x, *arguments)

    def gated_scan_with_states(self, x: Tensor, *arguments: Any) -> Any:
        """Run the operator; NotImplemented as for `gated_scan`."""
        return self._run("gated_scan_with_states", x, x, *arguments)

    def gated_scan_backward(self, grad: Tensor, x: Tensor, *arguments: Any) -> Any:
        """Run the operator; NotImplemented as for `gated_scan`."""
        return self._run("gated_scan_backward", x, grad, x, *arguments)

    def selective_scan(self, x: Tensor, *arguments: Any) -> Tensor:
        """Run the operator; NotImplemented as for `gated_scan`."""
        return self._run("selective_scan", x, x, *arguments)

    def selective_scan_backward(self, grad: Tensor, x: Tensor, *arguments: Any) -> Any:
        """Run the operator; NotImplemented as for `gated_scan`."""
        return self._run("selective_scan_backward", x, grad, x, *arguments)

    def _run(self, operator: str, x: Tensor, *arguments: Any) -> Any:
        if x.dtype not in self.dtypes:
            return NotImplemented
        return getattr(torch.ops.mobilemamba_kernels, operator)(*arguments)


cpu = CompiledBackend("cpu", (torch.float32, torch.bfloat16))
cuda = CompiledBackend("cuda", (torch.float32, torch.float16, torch.bfloat16))
