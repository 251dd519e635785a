"""The selective scan as runtimes like it: no loop, no write into a slice, maps as they are.

The recurrence h_t = a_t h_{t-1} + b_t is associative, so that a pixel can take in its neighbour, then that neighbour's
neighbours, ..., 1, 2, 4, ... pixels away. Here it does so within each row first; the rows then pass on their last
pixels in the same way, on a map one pixel wide. The number of doublings is fixed, and enough for the largest map:
more of them than a map needs change nothing, so one graph serves all smaller maps.

B batch, D channels, H height, W width, K directions, N state, R rank of the time step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..lib_mamba import SCANS

__all__ = ["DirectionalScan", "raster_recurrence", "scan_directions", "shift"]

_HEIGHT, _WIDTH = 2, 3


@torch.fx.wrap
def shift(x: Tensor, steps: int, dim: int, *, is_reverse: bool = False, value: float = 0.0) -> Tensor:
    """Move a map (B, D, H, W) by some pixels, and put ``value`` where nothing came.

    Args:
        x: The map.
        steps: The number of pixels, which may exceed the side.
        dim: 2 to move down, 3 to move right.
        is_reverse: Move up, or left.
        value: What comes in from outside.
    """
    pads = [0, 0, 0, 0]  # left, right, top, bottom
    pads[2 * (_WIDTH - dim) + is_reverse] = steps
    padded = F.pad(x, pads, value=value)
    kept = slice(steps, None) if is_reverse else slice(None, -steps)
    return padded[:, :, :, kept] if dim == _WIDTH else padded[:, :, kept]


def raster_recurrence(decay: Tensor, inputs: Tensor, levels: tuple[int, int], *, is_reverse: bool = False) -> Tensor:
    """Solve ``h_t = decay_t * h_{t-1} + inputs_t`` with ``h_{-1} = 0`` over pixels in raster order.

    Args:
        decay: (B, D, H, W).
        inputs: (B, D, H, W).
        levels: Doublings over the height and over the width, for sides of up to two to the power of these.
        is_reverse: Run from the last pixel to the first.

    Returns:
        Every state, (B, D, H, W).
    """
    row_levels, column_levels = levels
    for level in range(column_levels):
        inputs = inputs + decay * shift(inputs, 2**level, _WIDTH, is_reverse=is_reverse)
        decay = decay * shift(decay, 2**level, _WIDTH, is_reverse=is_reverse, value=1.0)
    if not row_levels:
        return inputs
    end = slice(None, 1) if is_reverse else slice(-1, None)
    row_decay, row = decay[..., end], inputs[..., end]
    for level in range(row_levels):
        row = row + row_decay * shift(row, 2**level, _HEIGHT, is_reverse=is_reverse)
        if level + 1 < row_levels:
            row_decay = row_decay * shift(row_decay, 2**level, _HEIGHT, is_reverse=is_reverse, value=1.0)
    return inputs + decay * shift(row, 1, _HEIGHT, is_reverse=is_reverse)


class DirectionalScan(nn.Module):
    """Some directions of a scan over pixels in one order, added up, without the skip term: (B, D, H, W) -> the same.

    Several directions run as one map with K * D channels, for which those that run backwards are flipped. A direction
    by itself is not flipped.

    Args:
        scan: The layer whose directions these are, folded.
        directions: Their places in its parameters, and whether each runs backwards.
        is_columns: Whether pixels are visited column by column.
        levels: See `raster_recurrence`; of the map as it is given.
    """

    def __init__(self, scan: Any, directions: dict[int, bool], *, is_columns: bool, levels: tuple[int, int]) -> None:
        super().__init__()
        places = list(directions)
        self.reverse = tuple(directions.values())
        self.is_columns = is_columns
        self.levels = (levels[1], levels[0]) if is_columns else levels
        num_all, channels, rank = scan.dt_projs_weight.shape
        self.channels, self.num_states = channels, scan.A_logs.shape[1]
        num = len(places)
        weight = scan.x_proj_weight[places]  # (K, R + 2N, D)
        dt, others = weight[:, :rank], weight[:, rank:]
        # Time steps of all directions, then B and C of each direction and component of the state.
        self.widths = (num * rank, *[1] * (2 * num * self.num_states))
        self.project = nn.Conv2d(num * channels, sum(self.widths), 1, bias=False)
        blocks = [torch.block_diag(*dt), torch.block_diag(*others)]
        self.project.weight = _frozen(torch.cat(blocks)[..., None, None])
        self.time_step = nn.Conv2d(num * rank, num * channels, 1)
        self.time_step.weight = _frozen(torch.block_diag(*scan.dt_projs_weight[places])[..., None, None])
        self.time_step.bias = _frozen(scan.dt_projs_bias[places].flatten())
        rate = -scan.A_logs.double().exp().to(scan.A_logs.dtype)
        rate = rate.view(num_all, channels, self.num_states)[places].view(1, num * channels, 1, 1, self.num_states)
        self.rates = nn.ParameterList(_frozen(rate[..., n]) for n in range(self.num_states))

    def forward(self, x: Tensor) -> Tensor:
        if self.is_columns:
            x = x.transpose(2, 3)
        y = self._scan(x)
        return y.transpose(2, 3) if self.is_columns else y

    def _scan(self, x: Tensor) -> Tensor:
        is_joined = len(self.reverse) > 1
        flips = [is_joined and is_reverse for is_reverse in self.reverse]
        sequences = [_flipped(x, is_flipped) for is_flipped in flips]
        projection = self.project(_joined(sequences))
        parts = projection.split(self.widths, dim=1)
        delta = F.softplus(self.time_step(parts[0]))
        y = None
        for n in range(self.num_states):
            B = [parts[1 + 2 * self.num_states * k + n] for k in range(len(flips))]
            C = [parts[1 + 2 * self.num_states * k + self.num_states + n] for k in range(len(flips))]
            decay = torch.exp(delta * self.rates[n])
            inputs = delta * _joined([sequence * B_k for sequence, B_k in zip(sequences, B, strict=True)])
            states = raster_recurrence(decay, inputs, self.levels, is_reverse=not is_joined and self.reverse[0])
            own = states.split([self.channels] * len(flips), dim=1)
            for k, is_flipped in enumerate(flips):
                output = _flipped(own[k] * C[k], is_flipped)
                y = output if y is None else y + output
        assert y is not None
        return y


def scan_directions(scan: Any, *, is_joined: bool, levels: tuple[int, int]) -> list[DirectionalScan]:
    """Return what computes the directions of a folded scan: one layer for each order of pixels, or each direction."""
    layers = []
    for is_columns, directions in SCANS[scan.scan]:
        groups: Sequence[dict[int, bool]] = [directions]
        if not is_joined:
            groups = [{place: is_reverse} for place, is_reverse in directions.items()]
        layers += [DirectionalScan(scan, group, is_columns=is_columns, levels=levels) for group in groups]
    return layers


def _joined(maps: list[Tensor]) -> Tensor:
    return torch.cat(maps, dim=1) if len(maps) > 1 else maps[0]


def _flipped(x: Tensor, is_flipped: bool) -> Tensor:
    return x.flip(2, 3) if is_flipped else x


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach().clone(), requires_grad=False)
