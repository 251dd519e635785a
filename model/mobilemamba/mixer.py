"""The mixer: channels split over a global, a local and an identity branch (paper, section 3.3).

The names `global_op`, `local_op`, `proj`, `dwconv3x3`, `dwconv1x1`, `bn1`, `bn2`, `attn` are those of the released
checkpoints; the kernel of `dwconv3x3` has the size of its stage. B batch, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers import BatchNorm2d, ConvBN
from .wavelet import WTEMamba

__all__ = ["MRFFI", "MKDeConv", "Mixer", "join_channels", "split_channels"]


def split_channels(channels: int, global_ratio: float, local_ratio: float) -> tuple[int, int, int]:
    """Return the channels of the global, local and identity branch, which add up to ``channels``.

    The global share is rounded to the nearest multiple of 16, up on a tie; the local one is cut where both would
    exceed the whole.

    Raises:
        ValueError: If the global share exceeds the whole.
    """
    num_global = (int(global_ratio * channels) + 8) // 16 * 16
    if num_global > channels:
        raise ValueError(f"global_ratio {global_ratio} takes {num_global} of {channels} channels: lower it")
    num_local = min(int(local_ratio * channels), channels - num_global)
    return num_global, num_local, channels - num_global - num_local


def join_channels(split: Sequence[int], *branches: Tensor) -> Tensor:
    """Return maps (B, C_i, H, W) with the channels ``split`` as one: an empty one among them would cost the layout."""
    return torch.cat([branch for branch, channels in zip(branches, split, strict=True) if channels], dim=1)


class MKDeConv(nn.Module):
    """MK-DeConv: depthwise k x k, BN, ReLU, depthwise 1 x 1, BN: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, channels: int, kernel_size: int) -> None:
        super().__init__()
        self.dwconv3x3 = nn.Conv2d(
            channels, channels, kernel_size, padding=kernel_size // 2, groups=channels, bias=False
        )
        self.bn1 = BatchNorm2d(channels)
        self.dwconv1x1 = nn.Conv2d(channels, channels, 1, groups=channels, bias=False)
        self.bn2 = BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.dwconv3x3(x)))
        # One number a channel: as a convolution, PyTorch would call it channel by channel on some CPUs and sizes.
        return self.bn2(x * self.dwconv1x1.weight.view(1, -1, 1, 1).to(x.dtype))


class MRFFI(nn.Module):
    """Multi-receptive-field feature interaction: (B, C, H, W) -> (B, C, H, W).

    Args:
        channels: C.
        global_ratio: Share of the channels that goes through WTE-Mamba.
        local_ratio: Share of the channels that goes through MK-DeConv; the rest passes unchanged.
        kernel_size: Side of the kernels of both branches, in pixels (of the bands, in the wavelet domain).
        ssm_ratio: See `SS2D`.
        d_state: See `SS2D`.
        scan: See `SS2D`.
    """

    def __init__(
        self,
        channels: int,
        *,
        global_ratio: float,
        local_ratio: float,
        kernel_size: int,
        ssm_ratio: float = 2.0,
        d_state: int = 1,
        scan: str = "bidirectional",
    ) -> None:
        super().__init__()
        self.split = split_channels(channels, global_ratio, local_ratio)
        num_global, num_local, _ = self.split
        self.global_op = (
            WTEMamba(num_global, kernel_size, ssm_ratio=ssm_ratio, d_state=d_state, scan=scan)
            if num_global
            else nn.Identity()
        )
        self.local_op = MKDeConv(num_local, kernel_size) if num_local else nn.Identity()
        self.proj = nn.Sequential(nn.ReLU(), ConvBN(channels, channels, bn_weight=0.0))

    def forward(self, x: Tensor) -> Tensor:
        x_global, x_local, x_identity = x.split(self.split, dim=1)
        x_global = self.global_op(x_global)
        x_local = self.local_op(x_local)
        return self.proj(join_channels(self.split, x_global, x_local, x_identity))


class Mixer(nn.Module):
    """A level between a block and its MRFFI, which the names in the released checkpoints ask for."""

    def __init__(self, attention: MRFFI) -> None:
        super().__init__()
        self.attn = attention

    def forward(self, x: Tensor) -> Tensor:
        return self.attn(x)
