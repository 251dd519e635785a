"""SS2D: a selective state-space layer over the pixels of a feature map (paper, section 3.2).

The parameter names `A_logs`, `Ds`, `dt_projs_*`, `x_proj_weight` and the module names are those of the released
checkpoints. B batch, C channels in and out, D inner channels, H height, W width, L = H * W, K directions, N state,
R rank of the time step.
"""

from __future__ import annotations

import math

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers import ConvBN
from .gated_scan import gated_scan
from .selective_scan import selective_scan

__all__ = ["SCANS", "SS2D"]

# torch.fx cannot follow their checks of sizes: it keeps the call.
torch.fx.wrap("gated_scan")
torch.fx.wrap("selective_scan")

# Per kind of scan: the orders in which the pixels are visited, and in each order the directions (is_reverse) with
# their places in the parameters. "cross" has the order of directions that is customary for four-way scans.
_ROWS, _COLUMNS = False, True
SCANS: dict[str, list[tuple[bool, dict[int, bool]]]] = {
    "single": [(_ROWS, {0: False})],
    "bidirectional": [(_ROWS, {0: False, 1: True})],
    "cross": [(_ROWS, {0: False, 2: True}), (_COLUMNS, {1: False, 3: True})],
}


class SS2D(nn.Module):
    """Gated selective scan of a feature map: (B, C, H, W) -> (B, C, H, W).

    Args:
        channels: C.
        ssm_ratio: D / C.
        d_state: N.
        scan: "bidirectional" (raster order, forward and backward; the released networks), "single" (forward
            only) or "cross" (rows and columns, both ways).

    Raises:
        ValueError: If ``scan`` is none of these.
    """

    def __init__(self, channels: int, *, ssm_ratio: float = 2.0, d_state: int = 1, scan: str = "bidirectional") -> None:
        super().__init__()
        if scan not in SCANS:
            raise ValueError(f"scan must be one of {', '.join(SCANS)}, got {scan!r}")
        self.scan = scan
        inner = int(ssm_ratio * channels)
        rank = math.ceil(channels / 16)
        num_directions = self.num_directions
        self.in_proj = ConvBN(channels, 2 * inner)
        self.conv2d = nn.Conv2d(inner, inner, 3, padding=1, groups=inner)
        self.act = nn.SiLU()
        bound = inner**-0.5  # nn.Linear's default
        self.x_proj_weight = nn.Parameter(
            torch.empty(num_directions, rank + 2 * d_state, inner).uniform_(-bound, bound)
        )
        self.dt_projs_weight = nn.Parameter(0.1 * torch.rand(num_directions, inner, rank))
        self.dt_projs_bias = nn.Parameter(0.1 * torch.rand(num_directions, inner))
        self.A_logs = nn.Parameter(torch.zeros(num_directions * inner, d_state))
        self.Ds = nn.Parameter(torch.ones(num_directions * inner))
        self.out_norm = nn.LayerNorm(inner, eps=1e-5)
        self.out_proj = ConvBN(inner, channels)

    @property
    def num_directions(self) -> int:
        """K."""
        return sum(len(directions) for _, directions in SCANS[self.scan])

    @property
    def reverse(self) -> tuple[bool, ...]:
        """Which directions run backwards, of a scan of the pixels in one order; nothing for one in several."""
        orders = SCANS[self.scan]
        return tuple(orders[0][1].values()) if len(orders) == 1 else ()

    def forward(self, x: Tensor) -> Tensor:
        x, z = self.in_proj(x).chunk(2, dim=1)
        x = self.act(self.conv2d(x))
        y = self.scan_and_gate(x.permute(0, 2, 3, 1), z.permute(0, 2, 3, 1))
        return self.out_proj(y.permute(0, 3, 1, 2))

    def scan_and_gate(self, x: Tensor, z: Tensor) -> Tensor:
        """Scan x, normalise, gate with z: both (B, H, W, D) -> (B, H, W, D). One operator where one order is enough."""
        orders = SCANS[self.scan]
        if len(orders) > 1:
            y = self.scan_pixels(x)
            y = self.out_norm(y.to(self.out_norm.weight.dtype)) * F.silu(z)
            return y.to(x.dtype)
        ((_, directions),) = orders
        sequence = x.flatten(1, 2)
        parameters = self._weights(directions)
        projection = self._project(sequence, parameters[0])
        norm = self.out_norm
        y = gated_scan(
            sequence,
            z.flatten(1, 2),
            projection,
            *parameters[1:],
            norm.weight,
            norm.bias,
            eps=norm.eps,
            reverse=self.reverse,
        )
        return y.view(x.shape)

    def scan_pixels(self, x: Tensor) -> Tensor:
        """Scan in all directions and add up: (B, H, W, D) -> (B, H, W, D), in the type of the state."""
        outputs = [self._scan_order(x, is_columns, directions) for is_columns, directions in SCANS[self.scan]]
        return outputs[0] if len(outputs) == 1 else torch.stack(outputs).sum(0)

    def _scan_order(self, x: Tensor, is_columns: bool, directions: dict[int, bool]) -> Tensor:
        if is_columns:
            x = x.transpose(1, 2)
        sequence = x.flatten(1, 2)
        parameters = self._weights(directions)
        projection = self._project(sequence, parameters[0])
        y = selective_scan(sequence, projection, *parameters[1:], reverse=tuple(directions.values()))
        y = y.view(x.shape)
        return y.transpose(1, 2) if is_columns else y

    def _project(self, sequence: Tensor, x_weight: Tensor) -> Tensor:
        """Return dt, B and C of all directions: a reversed sequence has the reversed projection."""
        return F.linear(sequence, x_weight.flatten(0, 1))

    def _weights(self, directions: dict[int, bool]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return x_proj's weight and the scan's dt_weight, dt_bias, A_log, D_skip of some of the directions."""
        parameters = (self.x_proj_weight, self.dt_projs_weight, self.dt_projs_bias, self.A_logs, self.Ds)
        if len(directions) == self.num_directions:
            return parameters
        places = list(directions)
        return tuple(self._take(parameter, places) for parameter in parameters)  # type: ignore[return-value]

    def _take(self, parameter: Tensor, directions: list[int]) -> Tensor:
        """Pick directions out of a parameter whose first dimension is K or K * D."""
        return parameter.unflatten(0, (self.num_directions, -1))[directions].flatten(0, 1)
