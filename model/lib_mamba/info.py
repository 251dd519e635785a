"""The backends of the scans on this machine: ``python -m model.lib_mamba.info`` lists them and checks each."""

from __future__ import annotations

import platform
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from . import backends, library
from .gated_scan import gated_scan
from .trial import TOLERANCES, relative_error, synthetic_inputs

__all__ = ["check", "describe", "main", "output_and_gradients"]


def check(name: str, device_type: str) -> dict[torch.dtype, tuple[float, float]]:
    """Run a backend and the reference in float64 on the same small input.

    Args:
        name: A backend that is available and serves the device.
        device_type: Where to run it.

    Returns:
        For each type of input, the largest relative error of the output and that of the nine gradients.
    """
    errors = {}
    for dtype in TOLERANCES:
        tensors = synthetic_inputs(dtype, device_type)
        with backends.use_backend(name):
            actual = output_and_gradients(tensors)
        with backends.use_backend(backends.REFERENCE):
            exact = output_and_gradients([tensor.double() for tensor in tensors])
        output, *gradients = [relative_error(*pair) for pair in zip(actual, exact, strict=True)]
        errors[dtype] = (output, max(gradients))
    return errors


def output_and_gradients(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the output of `gated_scan` for nine tensors, and their gradients for fixed weights of the output."""
    inputs = [tensor.detach().requires_grad_() for tensor in tensors]
    y = gated_scan(*inputs)
    weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64, device=y.device).cos().view_as(y)
    return [y.detach(), *torch.autograd.grad(y, inputs, weights.to(y.dtype))]


def describe() -> list[str]:
    """Return the lines that `main` prints before the checks."""
    lines = [f"Python {platform.python_version()}, PyTorch {torch.__version__}, {platform.machine()}"]
    lines += [f"CPU instruction set that PyTorch uses: {torch.backends.cpu.get_cpu_capability()}"]
    if torch.cuda.is_available():
        lines += [f"GPU: {torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"]
    for name in backends.NAMES:
        is_available, reason = backends.availability(name)
        lines += [f"{name:9} {'available' if is_available else 'missing'}: {reason}"]
    lines += _build_lines()
    for device_type in _device_types():
        choice = backends.choose(device_type)
        lines += [f"chosen on {device_type}: {choice.name} ({choice.reason})"]
    return lines


def _build_lines() -> list[str]:
    """Return for which GPUs the compiled library was built, or why its CUDA part was not."""
    built, errors = library.build_info()[0], library.cuda_errors()
    if errors:
        return [
            "the CUDA kernels could not be built, though nvcc was there:",
            *(f"  {line}" for line in errors),
            f"  with that mended, or to see it all: FORCE_CUDA=1 {library.BUILD}",
        ]
    if built.get("cuda"):
        return [f"compiled for CUDA {built['cuda']}, architectures {built.get('architectures', 'unknown')}"]
    return []


def _device_types() -> list[str]:
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def main() -> int:
    """Print the backends and their errors; return 1 if one fails or is not exact enough."""
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
        errors = check(name, device_type)
    except RuntimeError as error:
        sys.stdout.write(f"self-check of {name} on {device_type}: FAILED ({error})\n")
        return False
    is_exact = all(
        error <= limit for dtype, pair in errors.items() for error, limit in zip(pair, TOLERANCES[dtype], strict=True)
    )
    figures = ", ".join(f"{str(dtype).removeprefix('torch.')} {max(pair):.1e}" for dtype, pair in errors.items())
    outcome = "passed" if is_exact else "FAILED"
    sys.stdout.write(f"self-check of {name} on {device_type}: {outcome} (relative error: {figures})\n")
    return is_exact


if __name__ == "__main__":
    sys.exit(main())
