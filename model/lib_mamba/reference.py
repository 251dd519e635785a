"""The scans in plain PyTorch, which run anywhere and against which every other backend is checked.

B batch, L length, D channels, K directions, N state, R rank of the time step. Sequences are channels-last (B, L, D).

Notable:
  - The recurrence is solved by odd-even reduction: log2(L) levels, O(L) work, no division, hence no underflow.
  - A direction that runs backwards indexes from the end; nothing is flipped.
  - One direction and one state component at a time: no tensor is larger than (B, L, D).
  - The backward pass keeps only the inputs and recomputes the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "gated_scan",
    "gated_scan_backward",
    "linear_recurrence",
    "selective_scan",
    "selective_scan_backward",
    "state_dtype",
]


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the type of the hidden state: at least float32, whatever the input's."""
    return torch.promote_types(dtype, torch.float32)


def linear_recurrence(decay: Tensor, inputs: Tensor, *, is_reverse: bool = False) -> Tensor:
    """Solve ``h_t = decay_t * h_{t-1} + inputs_t`` with ``h_{-1} = 0`` along dimension 1.

    Args:
        decay: (B, L, D).
        inputs: (B, L, D).
        is_reverse: Run from the last position to the first: ``h_{t-1}`` becomes ``h_{t+1}``.

    Returns:
        Every state, (B, L, D), contiguous.
    """
    length = inputs.shape[1]
    if length == 1:
        return inputs.contiguous()
    # Pairs in the order of travel: (leader, follower). With an odd length the last leader stands alone.
    first = (length - 1) % 2 if is_reverse else 0
    leaders, followers = slice(first, None, 2), slice(1 - first, None, 2)
    num_pairs = length // 2
    paired = slice(-num_pairs, None) if is_reverse else slice(None, num_pairs)
    decay_leaders, inputs_leaders = decay[:, leaders], inputs[:, leaders]
    decay_followers = decay[:, followers]

    states_followers = linear_recurrence(
        decay_followers * decay_leaders[:, paired],
        torch.addcmul(inputs[:, followers], decay_followers, inputs_leaders[:, paired]),
        is_reverse=is_reverse,
    )

    states = torch.empty_like(inputs, memory_format=torch.contiguous_format)
    states[:, followers] = states_followers
    states_leaders = states[:, leaders]
    num_later = inputs_leaders.shape[1] - 1  # all leaders but the one that travels first
    start, later = (num_later, slice(None, num_later)) if is_reverse else (0, slice(1, None))
    before = slice(-num_later, None) if is_reverse else slice(None, num_later)
    states_leaders[:, start] = inputs_leaders[:, start]
    if num_later:
        states_leaders[:, later] = torch.addcmul(
            inputs_leaders[:, later], decay_leaders[:, later], states_followers[:, before]
        )
    return states


def _previous(states: Tensor, *, is_reverse: bool) -> Tensor:
    """Shift the states (B, L, D) by one step of travel: zero where there is none before."""
    shifted = torch.zeros_like(states)
    if is_reverse:
        shifted[:, :-1] = states[:, 1:]
    else:
        shifted[:, 1:] = states[:, :-1]
    return shifted


def _split(projection: Tensor, direction: int, rank: int, num_directions: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return dt (B, L, R), B (B, L, N) and C (B, L, N) of one direction, as views."""
    width = projection.shape[-1] // num_directions
    num_states = (width - rank) // 2
    own = projection[..., direction * width : (direction + 1) * width]
    return own.split([rank, num_states, num_states], dim=-1)


def selective_scan(
    x: Tensor,
    projection: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D_skip: Tensor,
    reverse: Sequence[int],
) -> Tensor:
    """Run every direction over ``x`` and add them up; see the public `selective_scan` for the arguments.

    Returns:
        (B, L, D) in the type of the state.
    """
    dtype = state_dtype(x.dtype)
    x, projection, dt_weight, dt_bias, A_log, D_skip = (
        tensor.to(dtype) for tensor in (x, projection, dt_weight, dt_bias, A_log, D_skip)
    )
    num_directions, channels, rank = dt_weight.shape
    A = -A_log.exp().view(num_directions, channels, -1)
    y = x * D_skip.view(num_directions, channels).sum(0)
    for k, is_reverse in enumerate(map(bool, reverse)):
        dt, B, C = _split(projection, k, rank, num_directions)
        delta = F.softplus(F.linear(dt, dt_weight[k], dt_bias[k]))
        delta_x = delta * x
        for n in range(A.shape[-1]):
            states = linear_recurrence((delta * A[k, :, n]).exp_(), delta_x * B[..., n, None], is_reverse=is_reverse)
            y.addcmul_(states, C[..., n, None])
    return y


def selective_scan_backward(
    grad: Tensor,
    x: Tensor,
    projection: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D_skip: Tensor,
    reverse: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of `selective_scan` for its six tensors, each in its tensor's type.

    Args:
        grad: Gradient of the output, (B, L, D).
        x: As given to `selective_scan`, and so the rest.
        projection: (B, L, K * (R + 2N)).
        dt_weight: (K, D, R).
        dt_bias: (K, D).
        A_log: (K * D, N).
        D_skip: (K * D,).
        reverse: K flags.
    """
    inputs = (x, projection, dt_weight, dt_bias, A_log, D_skip)
    dtype = state_dtype(x.dtype)
    grad, x, projection, dt_weight, dt_bias, A_log, D_skip = (tensor.to(dtype) for tensor in (grad, *inputs))
    num_directions, channels, rank = dt_weight.shape
    A = -A_log.exp().view(num_directions, channels, -1)

    dx = grad * D_skip.view(num_directions, channels).sum(0)
    dD = torch.sum(grad * x, dim=(0, 1)).repeat(num_directions)
    dprojection = torch.empty_like(projection, memory_format=torch.contiguous_format)
    ddt_weight, ddt_bias, dA = torch.empty_like(dt_weight), torch.empty_like(dt_bias), torch.empty_like(A)
    for k, is_reverse in enumerate(map(bool, reverse)):
        dt, B, C = _split(projection, k, rank, num_directions)
        grad_dt, grad_B, grad_C = _split(dprojection, k, rank, num_directions)
        raw = F.linear(dt, dt_weight[k], dt_bias[k])
        delta = F.softplus(raw)
        delta_x = delta * x
        ddelta = torch.zeros_like(delta)
        for n in range(A.shape[-1]):
            B_n, C_n = B[..., n, None], C[..., n, None]
            decay = (delta * A[k, :, n]).exp_()
            states = linear_recurrence(decay, delta_x * B_n, is_reverse=is_reverse)
            grad_C[..., n] = torch.sum(grad * states, dim=-1)
            # The state's gradient obeys the same recurrence the other way round, with the decay of the next step.
            next_decay = _previous(decay, is_reverse=not is_reverse)
            dstates = linear_recurrence(next_decay, grad * C_n, is_reverse=not is_reverse)
            grad_B[..., n] = torch.sum(dstates * delta_x, dim=-1)
            dlog_decay = _previous(states, is_reverse=is_reverse).mul_(dstates).mul_(decay)
            dA[k, :, n] = torch.sum(dlog_decay * delta, dim=(0, 1))
            ddelta.addcmul_(dlog_decay, A[k, :, n])
            dstates = dstates.mul_(B_n)
            ddelta.addcmul_(dstates, x)
            dx.addcmul_(dstates, delta)
        draw = ddelta.mul_(raw.sigmoid_())
        grad_dt.copy_(draw @ dt_weight[k])
        ddt_weight[k] = torch.einsum("bld,blr->dr", draw, dt)
        ddt_bias[k] = draw.sum((0, 1))
    grads = (dx, dprojection, ddt_weight, ddt_bias, (dA * A).view_as(A_log), dD)
    return tuple(grad.to(own.dtype) for grad, own in zip(grads, inputs, strict=True))  # type: ignore[return-value]


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
    eps: float,
    reverse: Sequence[int],
    *,
    scan: Callable[..., Tensor] = selective_scan,
) -> Tensor:
    """Scan, normalise over the channels, gate: (B, L, D) in the type of ``x``.

    The arguments are those of the public `gated_scan`, and ``scan``: the function above, or another backend's.
    """
    y = scan(x, projection, dt_weight, dt_bias, A_log, D_skip, reverse)
    y = F.layer_norm(y, y.shape[-1:], norm_weight.to(y.dtype), norm_bias.to(y.dtype), eps)
    return y.mul_(F.silu(z.to(y.dtype))).to(x.dtype)


def gated_scan_backward(
    grad: Tensor,
    x: Tensor,
    z: Tensor,
    projection: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D_skip: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    reverse: Sequence[int],
    *,
    scan: Callable[..., Tensor] = selective_scan,
    scan_backward: Callable[..., tuple[Tensor, ...]] = selective_scan_backward,
) -> tuple[Tensor, ...]:
    """Return the gradients of `gated_scan` for its nine tensors, each in its tensor's type.

    The arguments are the gradient of the output, (B, L, D), those of `gated_scan`, and ``scan_backward``: the
    gradients of ``scan``.
    """
    y = scan(x, projection, dt_weight, dt_bias, A_log, D_skip, reverse)
    grad, gate = grad.to(y.dtype), z.to(y.dtype)
    shape = y.shape[-1:]
    affine = (norm_weight.to(y.dtype), norm_bias.to(y.dtype))
    normed, mean, rstd = torch.native_layer_norm(y, shape, *affine, eps)
    dz = torch.ops.aten.silu_backward(grad * normed, gate)
    dy, dnorm_weight, dnorm_bias = torch.ops.aten.native_layer_norm_backward(
        grad * F.silu(gate), y, shape, mean, rstd, *affine, [True, True, True]
    )
    dx, *dparameters = scan_backward(dy, x, projection, dt_weight, dt_bias, A_log, D_skip, reverse)
    dnorm = (dnorm_weight.to(norm_weight.dtype), dnorm_bias.to(norm_bias.dtype))
    return (dx, dz.to(z.dtype), *dparameters, *dnorm)
