"""The selective scan with the normalisation and gate after it, as one operator of `torch.library` (paper, section 3.2).

One operator, so that a backend can keep the sum of the directions out of memory. For the backward pass it saves
its inputs and, on a GPU, a state of each direction every few positions and the norm's statistics; the rest is computed
again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import backends, reference
from .selective_scan import check_shapes
from .tracing import is_exporting

__all__ = ["gated_scan"]


_ARGUMENTS = (
    "Tensor x, Tensor z, Tensor projection, Tensor dt_weight, Tensor dt_bias, Tensor A_log, Tensor D_skip, "
    "Tensor norm_weight, Tensor norm_bias, float eps, SymInt[] reverse"
)
_NUM_TENSORS = 9
_GRADIENTS = ", ".join(["Tensor"] * _NUM_TENSORS)
# Every chunk keeps the states that enter it. The longest of equally good chunks comes first.
_CHUNK_LENGTHS = (16, 14, 13, 12, 9)


@torch.library.custom_op("mobilemamba::gated_scan", mutates_args=(), schema=f"({_ARGUMENTS}) -> Tensor")
def _gated(x: Tensor, *arguments: Any) -> Tensor:
    # Autocast would reach into the implementation and take the state out of fp32.
    with backends.without_autocast(x.device.type):
        return backends.gated_scan(x, *arguments)


@_gated.register_fake
def _(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op(
    "mobilemamba::gated_scan_backward",
    mutates_args=(),
    schema=f"(Tensor grad, {_ARGUMENTS}, Tensor? states=None, Tensor? statistics=None) -> ({_GRADIENTS})",
)
def _gated_backward(grad: Tensor, x: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    others, kept = arguments[: _NUM_TENSORS + 1], arguments[_NUM_TENSORS + 1 :]
    with backends.without_autocast(x.device.type):
        return backends.gated_scan_backward(grad, x, *others, kept=kept)


@_gated_backward.register_fake
def _(grad: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    return tuple(tensor.new_empty(tensor.shape) for tensor in inputs[:_NUM_TENSORS])


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.eps, ctx.reverse = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return (*_gated_backward(grad, *ctx.saved_tensors, ctx.eps, ctx.reverse), None, None)


_gated.register_autograd(_backward, setup_context=_setup_context)


@torch.library.custom_op(
    "mobilemamba::gated_scan_with_states", mutates_args=(), schema=f"({_ARGUMENTS}) -> (Tensor, Tensor, Tensor)"
)
def _gated_with_states(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    with backends.without_autocast(x.device.type):
        y, *kept = backends.gated_scan_with_states(x, *arguments)

    def as_promised(own: Tensor | None, shape: tuple[int, ...]) -> Tensor:
        if own is not None and own.shape == shape:
            return own
        # A tracer has been told this shape. No backend that keeps nothing reads it; whoever did would see infinity.
        return x.new_full(shape, torch.inf, dtype=torch.float32)

    states, statistics = map(as_promised, kept, _kept_shapes(x))
    return y, states, statistics


def _kept_shapes(x: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shapes of what is kept for ``x``.

    Of the states (B, 2, count, D), by the rule of csrc/scan/cuda/chunks.h; of the statistics (B, L, 2). Where nothing
    is kept, count and L are 0.
    """
    batch, length, channels = x.shape
    if not backends.keeps_states(x.device.type):
        return (batch, 2, 0, channels), (batch, 0, 2)
    count = 0
    if length > max(_CHUNK_LENGTHS):
        chunk = min(_CHUNK_LENGTHS, key=lambda positions: -(-length // positions) * positions)
        count = -(-length // chunk)
    return (batch, 2, count, channels), (batch, length, 2)


@_gated_with_states.register_fake
def _(x: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return x.new_empty(x.shape), *(x.new_empty(shape, dtype=torch.float32) for shape in _kept_shapes(x))


def _setup_context_with_states(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.eps, ctx.reverse = inputs
    kept = output[1:]
    ctx.save_for_backward(*tensors, *kept)
    ctx.mark_non_differentiable(*kept)


def _backward_with_states(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    *tensors, states, statistics = ctx.saved_tensors
    return (*_gated_backward(grad, *tensors, ctx.eps, ctx.reverse, states, statistics), None, None)


_gated_with_states.register_autograd(_backward_with_states, setup_context=_setup_context_with_states)


def _is_differentiated(tensors: Sequence[Tensor]) -> bool:
    """Return whether a backward pass may follow. A traced or exported network is for inference."""
    if torch.jit.is_tracing() or is_exporting():
        return False
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def gated_scan(
    x: Tensor,
    z: Tensor,
    projection: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D_skip: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    *,
    eps: float = 1e-5,
    reverse: Sequence[bool] = (False, True),
) -> Tensor:
    """Return ``layer_norm(selective_scan(x, ...)) * silu(z)``, normalised over the channels.

    State, normalisation and gate are float32 (float64 for float64 input) whatever the input's type::

        batch, length, channels, rank, num_states = 2, 64, 32, 4, 1
        x, z = torch.randn(2, batch, length, channels)
        projection = torch.randn(batch, length, 2 * (rank + 2 * num_states))
        dt_weight, dt_bias = torch.rand(2, channels, rank), torch.rand(2, channels)
        A_log, D_skip = torch.zeros(2 * channels, num_states), torch.ones(2 * channels)
        y = gated_scan(x, z, projection, dt_weight, dt_bias, A_log, D_skip, torch.ones(channels), torch.zeros(channels))

    Args:
        x: Sequence, (B, L, D). Positions may lie further apart than D, as in a view of a wider tensor: no copy is made.
        z: Input of the gate, (B, L, D), laid out as ``x``.
        projection: As for `selective_scan`, (B, L, K * (R + 2N)).
        dt_weight: (K, D, R).
        dt_bias: (K, D).
        A_log: (K * D, N).
        D_skip: (K * D,).
        norm_weight: Scale of the normalisation, (D,).
        norm_bias: Shift of the normalisation, (D,).
        eps: Added to the variance.
        reverse: For each of the K directions, whether it runs from the last position to the first.

    Returns:
        (B, L, D), in the type of ``x``.

    Raises:
        ValueError: If shapes do not fit together.
    """
    check_shapes(x, projection, dt_weight, dt_bias, A_log, D_skip, reverse)
    for name, tensor, wanted in (
        ("z", z, x.shape),
        ("norm_weight", norm_weight, x.shape[-1:]),
        ("norm_bias", norm_bias, x.shape[-1:]),
    ):
        if tensor.shape != wanted:
            raise ValueError(f"{name} must have the shape {tuple(wanted)} to fit x, got {tuple(tensor.shape)}")
    directions = [int(is_reverse) for is_reverse in reverse]
    # ONNX has no operators of ours: it gets what they are made of.
    run = reference.gated_scan if torch.onnx.is_in_onnx_export() else _gated
    tensors = (x, z, projection, dt_weight, dt_bias, A_log, D_skip, norm_weight, norm_bias)
    if _is_differentiated(tensors):
        return _gated_with_states(*tensors, eps, directions)[0]
    return run(*tensors, eps, directions)
