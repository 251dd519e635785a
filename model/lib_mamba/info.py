"""What can run the scans here: ``python -m model.lib_mamba.info`` lists the backends and checks each of them."""

from __future__ import annotations

import platform
import sys

import torch
from torch import Tensor

from . import backends
from .gated_scan import gated_scan
from .self_check import made_up_inputs, relative_error

__all__ = ["describe", "main", "self_check"]

# Largest accepted error of outputs and gradients, relative to the largest value of the exact ones.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}


def self_check(name: str, device_type: str) -> dict[torch.dtype, float]:
    """Run a backend and the reference in float64 on the same small input.

    Args:
        name: A backend that is available and serves the device.
        device_type: Where to run it.

    Returns:
        For each type of input, the largest relative error of the output and the nine gradients.
    """
    errors = {}
    for dtype in TOLERANCES:
        tensors = made_up_inputs(dtype, device_type)
        with backends.use_backend(name):
            actual = _output_and_gradients(tensors)
        with backends.use_backend(backends.REFERENCE):
            exact = _output_and_gradients([tensor.double() for tensor in tensors])
        errors[dtype] = max(relative_error(*pair) for pair in zip(actual, exact, strict=True))
    return errors


def _output_and_gradients(tensors: list[Tensor]) -> list[Tensor]:
    inputs = [tensor.detach().requires_grad_() for tensor in tensors]
    y = gated_scan(*inputs)
    weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64, device=y.device).cos().view_as(y)
    return [y.detach(), *torch.autograd.grad(y, inputs, weights.to(y.dtype))]


def describe() -> list[str]:
    """Return the lines that `main` prints before the self-checks."""
    lines = [f"Python {platform.python_version()}, PyTorch {torch.__version__}, {platform.machine()}"]
    lines += [f"CPU instruction set that PyTorch uses: {torch.backends.cpu.get_cpu_capability()}"]
    if torch.cuda.is_available():
        lines += [f"GPU: {torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"]
    for name in backends.NAMES:
        is_available, reason = backends.availability(name)
        lines += [f"{name:9} {'available' if is_available else 'missing'}: {reason}"]
    for device_type in _device_types():
        choice = backends.choose(device_type)
        lines += [f"chosen on {device_type}: {choice.name} ({choice.reason})"]
    return lines


def _device_types() -> list[str]:
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def main() -> int:
    """Print what there is and how exact it is; return 1 if a backend fails or is not exact enough."""
    sys.stdout.write("\n".join(describe()) + "\n")
    verdicts = [
        _verdict(name, device_type)
        for device_type in _device_types()
        for name in backends.NAMES
        if backends.availability(name)[0] and backends.serves(name, device_type)
    ]
    return 0 if all(verdicts) else 1


def _verdict(name: str, device_type: str) -> bool:
    """Check one backend, print the outcome, and return whether it passed."""
    try:
        errors = self_check(name, device_type)
    except RuntimeError as error:
        sys.stdout.write(f"self-check of {name} on {device_type}: FAILED ({error})\n")
        return False
    is_exact = all(error <= TOLERANCES[dtype] for dtype, error in errors.items())
    figures = ", ".join(f"{str(dtype).removeprefix('torch.')} {error:.1e}" for dtype, error in errors.items())
    outcome = "passed" if is_exact else "FAILED"
    sys.stdout.write(f"self-check of {name} on {device_type}: {outcome} (relative error: {figures})\n")
    return is_exact


if __name__ == "__main__":
    sys.exit(main())
