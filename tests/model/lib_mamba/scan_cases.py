"""Inputs for the gated scan, its definition as a loop over the positions, and how far a backend may be from it."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F

NAMES = ["x", "z", "projection", "dt_weight", "dt_bias", "A_log", "D_skip", "norm_weight", "norm_bias"]
# Largest error of the output and of the gradients, relative to the largest value.
TOLERANCES = {torch.float32: (3e-6, 2e-5), torch.bfloat16: (4e-3, 1e-2), torch.float16: (7e-4, 2e-3)}


def arguments(length, *, batch=2, channels=37, rank=3, num_states=1, num_directions=2, dtype=torch.float32, seed=0):
    """Random inputs; z is a view of a tensor twice as wide, as in the network."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

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


def loop(x, z, projection, dt_weight, dt_bias, A_log, D_skip, norm_weight, norm_bias, *, reverse=(False, True)):
    """The definition, one position after the other, differentiated by autograd."""
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
    return F.layer_norm(total, total.shape[-1:], norm_weight, norm_bias, 1e-5) * F.silu(z)


def output_and_gradients(function, tensors, **options):
    inputs = [tensor.detach().requires_grad_() for tensor in tensors]
    y = function(*inputs, **options)
    weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).cos().view_as(y).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, inputs, weights)]


def exact(tensors, **options):
    """Output and gradients of the definition in float64, on the rounded inputs."""
    return output_and_gradients(loop, [tensor.double() for tensor in tensors], **options)


@functools.cache
def exact_of_case(length, dtype, batch):
    return exact(arguments(length, dtype=dtype, batch=batch))


def relative_errors(actual, expected):
    errors = [
        ((one.double() - other).abs().max() / other.abs().max().clamp(min=1e-12)).item()
        for one, other in zip(actual, expected, strict=True)
    ]
    return dict(zip(["y", *NAMES], errors, strict=True))


def assert_accurate(actual, expected, dtype, backend=""):
    tolerance, gradient_tolerance = TOLERANCES[dtype]
    if backend not in ("reference", "cpu"):
        tolerance *= 2  # the sum of the directions may go through memory in the type of x before it is normalised
    errors = relative_errors(actual, expected)
    limits = dict.fromkeys(NAMES, gradient_tolerance) | {"y": tolerance}
    assert {name: error for name, error in errors.items() if not error <= limits[name]} == {}
