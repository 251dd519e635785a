"""The selective scan as runtimes like it: on maps with their channels last, of which a column is one piece of memory.

Each row is scanned by itself first, all rows at once, column by column; then the rows pass on the states at their ends.
For maps of one size these steps are written out; for any size ONNX has an operator that loops over them (`onnx_graph`).

B batch, D channels, H height, W width, K directions, N state, R rank of the time step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..lib_mamba import SCANS

__all__ = [
    "DirectionalScan",
    "any_recurrence",
    "doubling_recurrence",
    "exact_recurrence",
    "flip_sequence",
    "pad_row",
    "scan_directions",
]

_HEIGHT, _WIDTH = 1, 2


def exact_recurrence(decay: Tensor, inputs: Tensor, sides: tuple[int, int], *, is_reverse: bool = False) -> Tensor:
    """Solve ``h_t = decay_t * h_{t-1} + inputs_t`` with ``h_{-1} = 0`` over pixels in raster order, step by step.

    Args:
        decay: (B, H, W, D).
        inputs: (B, H, W, D).
        sides: H and W.
        is_reverse: Run from the last pixel to the first.

    Returns:
        Every state, (B, H, W, D).
    """
    height, width = sides
    columns, decays = _steps(decay, inputs, _WIDTH, width, is_reverse=is_reverse)
    states = torch.cat(columns, _WIDTH)
    if height == 1:
        return states
    last = 0 if is_reverse else -1
    rows, _ = _steps(decays[last], columns[last], _HEIGHT, height, is_reverse=is_reverse)
    ends = rows[1:] if is_reverse else rows[:-1]  # no row comes after the last
    before = pad_row(torch.cat(ends, _HEIGHT), is_reverse=is_reverse)
    return states + torch.cat(decays, _WIDTH) * before


def _steps(
    decay: Tensor, inputs: Tensor, dim: int, side: int, *, is_reverse: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """Return the state at each position along a dimension, and the product of the decays up to there."""
    if side == 1:
        return [inputs], [decay]
    split_decay, split_inputs = decay.split([1] * side, dim), inputs.split([1] * side, dim)
    decays, states = ([parts[index] for index in range(side)] for parts in (split_decay, split_inputs))
    order = range(side)[:: -1 if is_reverse else 1]
    for before, position in pairwise(order):
        states[position] = states[position] + decays[position] * states[before]
        decays[position] = decays[position] * decays[before]
    return states, decays


@torch.fx.wrap
def any_recurrence(decay: Tensor, inputs: Tensor, *, is_reverse: bool = False) -> Tensor:
    """Do as `exact_recurrence`, on maps of any height and width: one operation for torch.fx, whatever the size."""
    height, width = decay.shape[1:3]
    return exact_recurrence(decay, inputs, (height, width), is_reverse=is_reverse)


def doubling_recurrence(decay: Tensor, inputs: Tensor, levels: tuple[int, int], *, is_reverse: bool = False) -> Tensor:
    """Do as `exact_recurrence` on maps of sides up to two to the power of ``levels``, for exporters without a loop.

    Every pixel takes in its neighbour, then that neighbour's neighbours, ..., 1, 2, 4, ... pixels away.
    """
    row_levels, column_levels = levels
    states, decays = _double(decay, inputs, _WIDTH, column_levels, is_reverse=is_reverse)
    end = slice(None, 1) if is_reverse else slice(-1, None)
    rows, _ = _double(decays[:, :, end], states[:, :, end], _HEIGHT, row_levels, is_reverse=is_reverse)
    ends = rows[:, 1:] if is_reverse else rows[:, :-1]
    return states + decays * pad_row(ends, is_reverse=is_reverse)


def _double(decay: Tensor, inputs: Tensor, dim: int, levels: int, *, is_reverse: bool) -> tuple[Tensor, Tensor]:
    for level in range(levels):
        inputs = inputs + decay * _shift(inputs, 2**level, dim, is_reverse=is_reverse, value=0.0)
        decay = decay * _shift(decay, 2**level, dim, is_reverse=is_reverse, value=1.0)
    return inputs, decay


def _shift(x: Tensor, steps: int, dim: int, *, is_reverse: bool, value: float) -> Tensor:
    """Move a map along a dimension, and put ``value`` where nothing came."""
    before, after = (0, steps) if is_reverse else (steps, 0)
    padded = F.pad(x, (0, 0, before, after) if dim == _WIDTH else (0, 0, 0, 0, before, after), value=value)
    kept = slice(steps, None) if is_reverse else slice(None, -steps)
    return padded[:, :, kept] if dim == _WIDTH else padded[:, kept]


@torch.fx.wrap
def pad_row(x: Tensor, *, is_reverse: bool = False) -> Tensor:
    """Put a row of zeros above a map (B, H, W, D), or below."""
    return F.pad(x, (0, 0, 0, 0, 0, 1) if is_reverse else (0, 0, 0, 0, 1, 0))


class DirectionalScan(nn.Module):
    """Some directions of a scan over pixels in one order, added up, without the skip term: (B, H, W, D) -> the same.

    Several directions run as one map with K * D channels, for which those that run backwards are flipped. A direction
    by itself is not flipped.

    Args:
        scan: The layer whose directions these are, folded.
        directions: Their places in its parameters, and whether each runs backwards.
        is_columns: Whether pixels are visited column by column.
        sides: Height and width of the maps; None where these may be any.
        is_flat: Take and give pixels as a sequence, (B, H * W, D), row by row; for maps of known sides.
    """

    def __init__(
        self,
        scan: Any,
        directions: dict[int, bool],
        *,
        is_columns: bool,
        sides: tuple[int, int] | None,
        is_flat: bool,
    ) -> None:
        super().__init__()
        places = list(directions)
        self.reverse = tuple(directions.values())
        self.is_columns = is_columns
        self.is_flat = is_flat
        self.map_sides = sides
        self.sides = (sides[1], sides[0]) if sides and is_columns else sides
        self.levels: tuple[int, int] | None = None
        num_all, channels, rank = scan.dt_projs_weight.shape
        self.channels, self.num_states = channels, scan.A_logs.shape[1]
        # Of each direction in turn: the time step's R numbers, then B and C of each component of the state.
        self.widths = (rank, *[1] * (2 * self.num_states))
        self.project = _product(scan.x_proj_weight[places].flatten(0, 1), None)
        # Each direction's channels read its own R numbers of these, and none of the others.
        weights = [F.pad(weight, (0, 2 * self.num_states)) for weight in scan.dt_projs_weight[places]]
        self.time_step = _product(torch.block_diag(*weights), scan.dt_projs_bias[places].flatten())
        rates = -scan.A_logs.double().exp().to(scan.A_logs.dtype)
        rates = rates.view(num_all, channels, self.num_states)[places].flatten(0, 1)  # (K * D, N)
        self.rates = nn.ParameterList(_frozen(rate) for rate in rates.t())

    def use_doublings(self, sides: tuple[int, int]) -> None:
        """Run on maps of up to these sides by a fixed number of doublings, in place of a loop."""
        row_levels, column_levels = ((side - 1).bit_length() for side in sides)
        self.levels = (column_levels, row_levels) if self.is_columns else (row_levels, column_levels)

    def forward(self, x: Tensor) -> Tensor:
        if not self.is_columns:
            return self._scan(x)
        x = self._flat(self._maps(x, self.map_sides).transpose(_HEIGHT, _WIDTH))
        y = self._maps(self._scan(x), self.sides)
        return self._flat(y.transpose(_HEIGHT, _WIDTH))

    def _scan(self, x: Tensor) -> Tensor:
        num, width = len(self.reverse), len(self.widths)
        flips = [num > 1 and is_reverse for is_reverse in self.reverse]
        sequences = [self._flipped(x, is_flipped) for is_flipped in flips]
        projection = self.project(x)
        if num > 1:  # a flipped sequence has the flipped projection, which is the smaller one to flip
            own = projection.split([sum(self.widths)] * num, dim=-1)
            projection = _joined([self._flipped(own[k], is_flipped) for k, is_flipped in enumerate(flips)])
        delta = F.softplus(self.time_step(projection))
        parts = projection.split(self.widths * num, dim=-1)
        y = None
        for n, rate in enumerate(self.rates):
            decay = torch.exp(delta * rate)
            inputs = delta * _joined([sequence * parts[k * width + 1 + n] for k, sequence in enumerate(sequences)])
            states = self._recurrence(decay, inputs).split([self.channels] * num, dim=-1)
            for k, is_flipped in enumerate(flips):
                output = self._flipped(states[k] * parts[k * width + 1 + self.num_states + n], is_flipped)
                y = output if y is None else y + output
        assert y is not None
        return y

    def _recurrence(self, decay: Tensor, inputs: Tensor) -> Tensor:
        is_reverse = len(self.reverse) == 1 and self.reverse[0]
        if self.levels is not None:
            return doubling_recurrence(decay, inputs, self.levels, is_reverse=is_reverse)
        if self.sides is None:
            return any_recurrence(decay, inputs, is_reverse=is_reverse)
        num = len(self.reverse)
        decay, inputs = (self._maps(x, self.sides, num) for x in (decay, inputs))
        return self._flat(exact_recurrence(decay, inputs, self.sides, is_reverse=is_reverse), num)

    def _maps(self, x: Tensor, sides: tuple[int, int] | None, num: int = 1) -> Tensor:
        """Return sequences (B, L, num * D) as maps, where they are sequences."""
        return x.reshape(-1, *sides, num * self.channels) if self.is_flat and sides else x

    def _flat(self, x: Tensor, num: int = 1) -> Tensor:
        """Undo `_maps`."""
        return x.reshape(-1, math.prod(self.sides), num * self.channels) if self.is_flat and self.sides else x

    def _flipped(self, x: Tensor, is_flipped: bool) -> Tensor:
        if not is_flipped:
            return x
        if not self.is_flat or self.sides is None:
            return x.flip(_HEIGHT, _WIDTH)
        return flip_sequence(x, self.sides[0] * self.sides[1])


@torch.fx.wrap
def flip_sequence(x: Tensor, length: int) -> Tensor:
    """Flip sequences (B, L, D) of a known length."""
    assert x.shape[1] == length
    return x.flip(1)


def scan_directions(
    scan: Any, sides: tuple[int, int] | None, *, is_joined: bool, is_flat: bool = False
) -> list[DirectionalScan]:
    """Return what computes the directions of a folded scan: one layer for each order of pixels, or each direction.

    Args:
        scan: The layer.
        sides: See `DirectionalScan`.
        is_joined: Whether directions share a layer.
        is_flat: See `DirectionalScan`.
    """
    layers = []
    for is_columns, directions in SCANS[scan.scan]:
        groups: Sequence[dict[int, bool]] = [directions]
        if not is_joined:
            groups = [{place: is_reverse} for place, is_reverse in directions.items()]
        layers += [
            DirectionalScan(scan, group, is_columns=is_columns, sides=sides, is_flat=is_flat) for group in groups
        ]
    return layers


def _joined(maps: list[Tensor]) -> Tensor:
    return torch.cat(maps, dim=-1) if len(maps) > 1 else maps[0]


def _product(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """Return a product with the matrix (C', C)."""
    product = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    product.weight = _frozen(weight)
    if bias is not None:
        product.bias = _frozen(bias)
    return product


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach().clone(), requires_grad=False)
