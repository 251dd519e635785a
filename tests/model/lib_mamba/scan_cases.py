"""Inputs for the scans, their definition as a loop over the positions, and how far a backend may be from it."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F

NAMES = ["x", "z", "projection", "dt_weight", "dt_bias", "A_log", "D_skip", "norm_weight", "norm_bias"]
# Largest error of the output and of the gradients, relative to the largest value.
TOLERANCES = {torch.float32: (3e-6, 2e-5), torch.bfloat16: (4e-3, 1e-2), torch.float16: (7e-4, 2e-3)}


class Backend(NamedTuple):
    """A backend of `model.lib_mamba.backends`, and the device that its tensors are on."""

    name: str
    device: torch.device


def arguments(
    length, *, batch=2, channels=37, rank=3, num_states=1, num_directions=2, dtype=torch.float32, device="cpu"
):
    """Random inputs of the gated scan; z is a view of a tensor twice as wide, as in the network."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(device)

    return [
        normal(batch, length, channels).to(dtype),
        normal(batch, length, 2 * channels).to(dtype)[..., channels:],
        normal(batch, length, num_directions * (rank + 2 * num_states)).to(dtype),
        normal(num_directions, channels, rank),
        normal(num_directions, channels),
        normal(num_directions * channels, num_states),
        normal(num_directions * channels),
        normal(channels),
        normal(channels),
    ]


def scan_arguments(length, **sizes):
    """Random inputs of the plain scan: those without gate and norm."""
    x, _, *others = arguments(length, **sizes)
    return [x, *others[:5]]


def scan_loop(x, projection, dt_weight, dt_bias, A_log, D_skip, *, reverse=(False, True)):
    """The definition of the scan, one position after the other, differentiated by autograd."""
    num_directions, channels, rank = dt_weight.shape
    num_states = A_log.shape[1]
    A = -A_log.exp().view(num_directions, channels, num_states)
    total = x * D_skip.view(num_directions, channels).sum(0)
    for k, own in enumerate(projection.chunk(num_directions, -1)):
        dt, B, C = own.split([rank, num_states, num_states], -1)
        delta = F.softplus(dt @ dt_weight[k].T + dt_bias[k])[..., None]
        decay, inputs = (delta * A[k]).exp(), delta * B[:, :, None] * x[..., None]
        state, states = torch.zeros_like(inputs[:, 0]), [None] * x.shape[1]
        for t in reversed(range(x.shape[1])) if reverse[k] else range(x.shape[1]):
            states[t] = state = torch.addcmul(inputs[:, t], decay[:, t], state)
        total = total + (torch.stack(states, 1) * C[:, :, None]).sum(-1)
    return total


def gated_scan_loop(x, z, projection, dt_weight, dt_bias, A_log, D_skip, norm_weight, norm_bias, **options):
    """The definition of the gated scan: the loop, the norm over the channels, the gate."""
    y = scan_loop(x, projection, dt_weight, dt_bias, A_log, D_skip, **options)
    return F.layer_norm(y, y.shape[-1:], norm_weight, norm_bias, 1e-5) * F.silu(z)


def exact_statistics(tensors):
    """Mean over the channels and 1 / deviation of every position's sum, by the loop in float64: (B, L, 2)."""
    x, _, *scan = (tensor.double() for tensor in tensors[:7])
    y = scan_loop(x, *scan)
    return torch.stack([y.mean(-1), (y.var(-1, correction=0) + 1e-5).rsqrt()], -1)


def statistics_error(actual, expected):
    """Largest error: of a mean in deviations, of 1 / deviation relative to itself."""
    assert actual.shape == expected.shape
    rstd = expected[..., 1]
    return ((actual - expected).abs() * torch.stack([rstd, 1 / rstd], -1)).max()


def output_and_gradients(function, tensors, **options):
    inputs = [tensor.detach().requires_grad_() for tensor in tensors]
    y = function(*inputs, **options)
    weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).cos().view_as(y).to(y)
    return [y.detach(), *torch.autograd.grad(y, inputs, weights)]


def exact(tensors, definition=gated_scan_loop, **options):
    """Output and gradients of a definition in float64 on the CPU, for the rounded inputs."""
    return output_and_gradients(definition, [tensor.double().cpu() for tensor in tensors], **options)


@functools.cache
def exact_of_case(length, dtype, batch):
    return exact(arguments(length, dtype=dtype, batch=batch))


def relative_errors(actual, expected, names=NAMES):
    """By name, the largest error of the output and of every gradient relative to the largest exact value."""
    errors = [
        ((one.double().cpu() - other).abs().max() / other.abs().max().clamp(min=1e-12)).item()
        for one, other in zip(actual, expected, strict=True)
    ]
    return dict(zip(["y", *names], errors, strict=True))


def assert_accurate(actual, expected, dtype, backend=""):
    tolerance, gradient_tolerance = TOLERANCES[dtype]
    if backend not in ("reference", "cpu"):
        # Special functions are approximate, and Triton's interpreter cuts to bfloat16 where a GPU rounds.
        is_cut = backend == "triton" and not actual[0].is_cuda
        tolerance *= 2 if dtype == torch.float32 or is_cut else 1.2
    errors = relative_errors(actual, expected)
    limits = dict.fromkeys(NAMES, gradient_tolerance) | {"y": tolerance}
    assert {name: error for name, error in errors.items() if not error <= limits[name]} == {}
