"""The backend "triton": the gated scan of the released networks, for a GPU where no compiled kernel is installed.

Covers two directions (forward, backward) with one state component and a rank up to 64; other scans are declined. Under
Triton's interpreter (TRITON_INTERPRET=1) it runs on CPU tensors too, for tests.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from . import triton_backward, triton_forward

__all__ = ["gated_scan", "gated_scan_backward", "is_available"]

MAX_RANK = 64
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_BLOCK_D = 32
# Positions of a tile. The backward kernel holds much more of each: with 32 it would run out of registers.
_MAX_BLOCK_L, _MAX_BLOCK_L_BACKWARD = 32, 16
# Up to this many tiles their number is known when a kernel is compiled: every length of the released networks.
_MAX_KNOWN_TILES = 8


def _is_interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def is_available() -> tuple[bool, str]:
    """Return whether the kernels can run here, and the version or what is missing."""
    version = f"triton {triton.__version__}"
    if _is_interpreting():
        return True, f"{version}, interpreted on the CPU (TRITON_INTERPRET is set)"
    if not torch.cuda.is_available():
        return False, f"{version} is installed, but PyTorch finds no CUDA device"
    capability = torch.cuda.get_device_capability()
    if torch.version.cuda and capability < (8, 0):
        return False, f"{version} needs a GPU of compute capability 8.0 or more, this one has {capability}"
    return True, version


def _covers(x: Tensor, dt_weight: Tensor, A_log: Tensor, reverse: Sequence[int]) -> bool:
    """Return whether the kernels are made for such a scan."""
    is_released = list(reverse) == [0, 1] and A_log.shape[1] == 1 and dt_weight.shape[2] <= MAX_RANK
    return is_released and x.dtype in _DTYPES


def _rows(tensor: Tensor) -> Tensor:
    """Return (B, L, D) as rows (B * L, D) of unit inner stride: a view where the strides allow it."""
    rows = tensor.flatten(0, 1)
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _on_device(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


class _Scan:
    """The common arguments of the kernels of one scan: inputs, sizes and tiles."""

    def __init__(self, max_block_l: int, x: Tensor, projection: Tensor, *parameters: Tensor) -> None:
        self.batch, self.length, self.channels = x.shape
        self.rank = parameters[0].shape[2]
        self.x = _rows(x)
        self.projection = projection.contiguous()
        self.parameters = tuple(parameter.float().contiguous() for parameter in parameters)
        self.block_l = min(max(triton.next_power_of_2(self.length), 16), max_block_l)
        self.num_tiles = triton.cdiv(self.length, self.block_l)
        is_known = self.num_tiles <= _MAX_KNOWN_TILES or _is_interpreting()
        self.grid = (triton.cdiv(self.channels, _BLOCK_D), self.batch)
        self.sizes = (self.length, self.channels, self.rank, self.x.stride(0))
        self.tiles = {
            "BLOCK_L": self.block_l,
            "BLOCK_D": _BLOCK_D,
            "BLOCK_R": max(triton.next_power_of_2(self.rank), 16),
            "NUM_TILES": self.num_tiles if is_known else 0,
            # 16-bit values lose nothing in tf32; float32 would.
            "PRECISION": "ieee" if x.dtype == torch.float32 else "tf32",
        }

    def forward(self, y: Tensor, checkpoints: Tensor | None = None) -> None:
        """Write the sum of both directions to ``y`` (B, L, D; fp32), and the states that enter each tile."""
        saved = y if checkpoints is None else checkpoints
        arguments = (self.x, self.projection, *self.parameters, y, saved, *self.sizes)
        triton_forward.scan_kernel[self.grid](*arguments, SAVE=checkpoints is not None, **self.tiles)

    def backward(self, dy: Tensor, checkpoints: Tensor) -> tuple[Tensor, ...]:
        """Return the gradients of x, projection, dt_weight, dt_bias, A_log and D_skip; all but the first in fp32."""
        shape = (self.batch, self.length, self.channels)
        # The share of one direction may exceed the range of float16 where the sum does not.
        half = self.x.dtype == torch.float16
        dx = torch.empty(shape, dtype=torch.float32 if half else self.x.dtype, device=dy.device)
        dprojection = dy.new_empty(self.grid[0], *self.projection.shape)
        dparameters = dy.new_empty(self.batch, 2, self.channels, self.rank + 3)
        arguments = (dy, self.x, self.projection, *self.parameters, checkpoints, dx, dprojection, dparameters)
        for direction in range(2):
            options = {"DIRECTION": direction, "num_stages": 2, **self.tiles}
            triton_backward.scan_backward_kernel[self.grid](*arguments, *self.sizes, **options)
        ddt_weight, ddt_bias, dA_log, dD = dparameters.sum(0).split([self.rank, 1, 1, 1], dim=-1)
        dD_skip = dD[:1].expand_as(dD)  # both directions pass x on alike
        flat = (dA_log.flatten(0, 1), dD_skip.flatten())
        return (dx.to(self.x.dtype), dprojection.sum(0), ddt_weight, ddt_bias.squeeze(-1), *flat)


def _norm_tiles(channels: int) -> dict[str, int]:
    block_d = triton.next_power_of_2(channels)
    return {"BLOCK_D": block_d, "BLOCK_ROWS": max(1, 2048 // block_d)}


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
) -> Tensor:
    """Scan, normalise, gate: (B, L, D); NotImplemented for a scan that the kernels are not made for."""
    if not _covers(x, dt_weight, A_log, reverse):
        return NotImplemented
    total = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    y = total if x.dtype == torch.float32 else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    gate, num_rows, channels = _rows(z), x.shape[0] * x.shape[1], x.shape[2]
    tiles = _norm_tiles(channels)
    with _on_device(x):
        _Scan(_MAX_BLOCK_L, x, projection, dt_weight, dt_bias, A_log, D_skip).forward(total)
        triton_forward.norm_gate_kernel[(triton.cdiv(num_rows, tiles["BLOCK_ROWS"]),)](
            total, gate, norm_weight.float(), norm_bias.float(), y, num_rows, channels, gate.stride(0), eps, **tiles
        )
    return y


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
) -> tuple[Tensor, ...]:
    """Return the gradients of `gated_scan` for its nine tensors, each in its tensor's type, or NotImplemented."""
    if not _covers(x, dt_weight, A_log, reverse):
        return NotImplemented
    scan = _Scan(_MAX_BLOCK_L_BACKWARD, x, projection, dt_weight, dt_bias, A_log, D_skip)
    y = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    checkpoints = y.new_empty(scan.batch, 2, scan.num_tiles, scan.channels)
    dz = torch.empty(z.shape, dtype=z.dtype, device=z.device)
    grad, gate, num_rows = _rows(grad), _rows(z), x.shape[0] * x.shape[1]
    tiles = _norm_tiles(scan.channels)
    num_blocks = triton.cdiv(num_rows, tiles["BLOCK_ROWS"])
    num_steps = min(triton.next_power_of_2(num_blocks // 1024 + 1), 16)
    num_programs = triton.cdiv(num_blocks, num_steps)
    dnorm = y.new_empty(num_programs, 2, scan.channels)
    with _on_device(x):
        scan.forward(y, checkpoints)
        arguments = (grad, y, gate, norm_weight.float(), norm_bias.float(), dz, dnorm, num_rows, scan.channels)
        triton_backward.norm_gate_backward_kernel[(num_programs,)](
            *arguments, grad.stride(0), gate.stride(0), eps, NUM_STEPS=num_steps, **tiles
        )
        dx, *dscan = scan.backward(y, checkpoints)
    inputs = (projection, dt_weight, dt_bias, A_log, D_skip, norm_weight, norm_bias)
    gradients = (*dscan, *dnorm.sum(0).unbind())
    # Copies: the operator's results may not share memory, and some of these are slices of one sum.
    layout = torch.contiguous_format
    copies = (
        own.to(tensor.dtype, copy=True, memory_format=layout) for own, tensor in zip(gradients, inputs, strict=True)
    )
    return (dx, dz, *copies)
