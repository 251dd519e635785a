"""The selective scan as one operator of `torch.library`: schema, fake kernel, autograd (paper, section 3.2).

The layers above call `selective_scan` and never know which backend ran; `backends` chooses it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import backends, reference

__all__ = ["check_shapes", "selective_scan"]

# The operators take `reverse` as integers: torch.jit cannot trace a list of booleans.
_ARGUMENTS = (
    "Tensor x, Tensor projection, Tensor dt_weight, Tensor dt_bias, Tensor A_log, Tensor D_skip, SymInt[] reverse"
)
_NUM_TENSORS = 6
_GRADIENTS = ", ".join(["Tensor"] * _NUM_TENSORS)


@torch.library.custom_op("mobilemamba::selective_scan", mutates_args=(), schema=f"({_ARGUMENTS}) -> Tensor")
def _scan(x: Tensor, *arguments: Any) -> Tensor:
    # Autocast would reach into the implementation and take the state out of fp32.
    with backends.without_autocast(x.device.type):
        return backends.selective_scan(x, *arguments)


@_scan.register_fake
def _(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape, dtype=reference.state_dtype(x.dtype))


@torch.library.custom_op(
    "mobilemamba::selective_scan_backward", mutates_args=(), schema=f"(Tensor grad, {_ARGUMENTS}) -> ({_GRADIENTS})"
)
def _scan_backward(grad: Tensor, x: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    with backends.without_autocast(x.device.type):
        return backends.selective_scan_backward(grad, x, *arguments)


@_scan_backward.register_fake
def _(grad: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    return tuple(tensor.new_empty(tensor.shape) for tensor in inputs[:_NUM_TENSORS])


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.reverse = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return (*_scan_backward(grad, *ctx.saved_tensors, ctx.reverse), None)


_scan.register_autograd(_backward, setup_context=_setup_context)


def check_shapes(
    x: Tensor,
    projection: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D_skip: Tensor,
    reverse: Sequence[bool],
) -> None:
    """Raise a ValueError if the arguments of a scan do not fit together, naming the one that does not."""
    if x.dim() != 3 or x.shape[1] == 0:
        raise ValueError(f"x must be (B, L, D) with L >= 1, got {tuple(x.shape)}")
    num_directions, channels, rank = dt_weight.shape
    num_states = A_log.shape[-1]
    expected = {
        "x": (x.shape, (*x.shape[:2], channels)),
        "projection": (projection.shape, (*x.shape[:2], num_directions * (rank + 2 * num_states))),
        "dt_bias": (dt_bias.shape, (num_directions, channels)),
        "A_log": (A_log.shape, (num_directions * channels, num_states)),
        "D_skip": (D_skip.shape, (num_directions * channels,)),
        "reverse": ((len(reverse),), (num_directions,)),
    }
    for name, (actual, wanted) in expected.items():
        if actual != wanted:
            raise ValueError(
                f"{name} must have the shape {wanted} to fit dt_weight {tuple(dt_weight.shape)}, got {tuple(actual)}"
            )


def selective_scan(
    x: Tensor,
    projection: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D_skip: Tensor,
    *,
    reverse: Sequence[bool] = (False, True),
) -> Tensor:
    """Scan a sequence in K directions and add the results up, each at its own position.

    For direction k, with ``(dt, B, C)`` its share of ``projection``::

        delta = softplus(dt_weight[k] @ dt + dt_bias[k])
        h_t = exp(-delta * exp(A_log)) * h_{t-1} + delta * B_t * x_t
        y_t = C_t . h_t + D_skip * x_t

    where ``t - 1`` is ``t + 1`` if the direction is reversed. The state is float32 (float64 for float64 input)
    whatever the input's type, under autocast too.

    Args:
        x: Sequence, (B, L, D).
        projection: Time step, input and output matrices of all directions, (B, L, K * (R + 2N)).
        dt_weight: Low-rank time-step projection, (K, D, R).
        dt_bias: (K, D).
        A_log: (K * D, N).
        D_skip: (K * D,).
        reverse: For each of the K directions, whether it runs from the last position to the first.

    Returns:
        (B, L, D), in the type of the state.

    Raises:
        ValueError: If shapes do not fit together.
    """
    check_shapes(x, projection, dt_weight, dt_bias, A_log, D_skip, reverse)
    directions = [int(is_reverse) for is_reverse in reverse]
    # ONNX has no operators of ours: it gets what they are made of.
    run = reference.selective_scan if torch.onnx.is_in_onnx_export() else _scan
    return run(x, projection, dt_weight, dt_bias, A_log, D_skip, directions)
