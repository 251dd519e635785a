"""A trial of a backend on small synthetic inputs, next to the reference in float64, before real inputs depend on it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import reference

__all__ = ["TOLERANCES", "Tolerance", "problem_of", "relative_error", "synthetic_inputs"]


class Tolerance(NamedTuple):
    """Largest errors against float64, relative to the largest exact value: of rounding, not of a wrong kernel."""

    output: float
    gradients: float


# By the type of the sequences.
TOLERANCES = {
    torch.float32: Tolerance(1e-5, 5e-5),
    torch.bfloat16: Tolerance(8e-3, 1.6e-2),
    torch.float16: Tolerance(1.4e-3, 4e-3),
}
# Type and sizes: the ways in which kernels differ, the last one a scan of a released network, which has kernels of its
# own. Few, as Triton compiles kernels for each.
_CASES: tuple[tuple[torch.dtype, dict[str, int]], ...] = (
    (torch.bfloat16, {"length": 20}),
    (torch.float32, {"length": 80}),
    (torch.float32, {"length": 20, "num_states": 2}),
    (torch.bfloat16, {"length": 256, "channels": 320, "rank": 10}),
)
# An unknown device may round a little more than those that the table is for; a wrong kernel is off by far more.
_SLACK = 2
_EPS, _REVERSE = 1e-5, [0, 1]


def synthetic_inputs(
    dtype: torch.dtype,
    device: torch.device | str,
    *,
    batch: int = 2,
    length: int = 50,
    channels: int = 40,
    rank: int = 3,
    num_states: int = 1,
) -> list[Tensor]:
    """Return the nine tensors of `gated_scan` for two directions: sequences in ``dtype``, parameters in float32."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    sequences = (
        normal(batch, length, channels),
        normal(batch, length, channels),
        normal(batch, length, 2 * (rank + 2 * num_states)),
    )
    parameters = (
        normal(2, channels, rank),
        normal(2, channels),
        normal(2 * channels, num_states),
        normal(2 * channels),
        normal(channels),
        normal(channels),
    )
    return [tensor.to(device, dtype) for tensor in sequences] + [tensor.to(device) for tensor in parameters]


def relative_error(actual: Tensor, exact: Tensor) -> float:
    """Return the largest error relative to the largest exact value; NaN where there is one."""
    return ((actual.double() - exact).abs().max() / exact.abs().max()).item()


@torch.no_grad()
def problem_of(backend: Any, device: torch.device) -> str:
    """Run a backend's functions, forward and backward, on small inputs, next to the reference in float64.

    Takes milliseconds on a GPU, and for Triton the time in which it compiles these kernels.

    Returns:
        What is wrong: that a function raises, or how far its results are off. Empty if all is well.
    """
    for dtype, sizes in _CASES:
        tensors = synthetic_inputs(dtype, device, **sizes)
        where = f"{str(dtype).removeprefix('torch.')}, {sizes['length']} positions"
        for name, arguments in _calls(tensors):
            try:
                error = _error_of(backend, name, arguments)
            except Exception as raised:
                return f"{name} raises {type(raised).__name__} ({where}): {raised}"
            if not error <= _SLACK * TOLERANCES[dtype].gradients:
                return f"{name} is off by {error:.1e} ({where})"
    return ""


def _calls(tensors: Sequence[Tensor]) -> Iterator[tuple[str, list[Any]]]:
    """Yield the operators with their arguments."""
    x, _, *scan = tensors[:7]
    grad = torch.linspace(-1, 1, x.numel(), device=x.device).view_as(x)
    yield "gated_scan", [*tensors, _EPS, _REVERSE]
    yield "gated_scan_backward", [grad.to(x.dtype), *tensors, _EPS, _REVERSE]
    yield "selective_scan", [x, *scan, _REVERSE]
    yield "selective_scan_backward", [grad, x, *scan, _REVERSE]


def _error_of(backend: Any, name: str, arguments: list[Any]) -> float:
    """Return the largest relative error of a function's results; 0 where it has no such function, or declines."""
    function = getattr(backend, name, None)
    results = NotImplemented if function is None else function(*arguments)
    if results is NotImplemented:
        return 0.0
    doubles = [value.double() if isinstance(value, Tensor) else value for value in arguments]
    exact = getattr(reference, name)(*doubles)
    if isinstance(results, Tensor):
        results, exact = (results,), (exact,)
    errors = [relative_error(*pair) for pair in zip(results, exact, strict=True)]
    return max(errors, key=lambda error: float("inf") if error != error else error)
