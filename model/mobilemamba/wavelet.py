"""WTE-Mamba: a global scan, enhanced by a convolution in the wavelet domain (paper, section 3.3).

The names `global_atten`, `wavelet_convs`, `wavelet_scale`, `base_scale`, `wt_filter`, `iwt_filter` are those of the
released checkpoints. B batch, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.models import register_notrace_module
from torch import Tensor, nn

from ..lib_mamba import SS2D

__all__ = ["ChannelScale", "WTEMamba", "haar_bands", "haar_filters", "haar_pixels", "is_haar"]

BANDS = 4
# One level of Haar (db1) on 2 x 2 pixels: low-low, low-high, high-low, high-high.
HAAR = [
    [[0.5, 0.5], [0.5, 0.5]],
    [[0.5, 0.5], [-0.5, -0.5]],
    [[0.5, -0.5], [0.5, -0.5]],
    [[0.5, -0.5], [-0.5, 0.5]],
]


def haar_filters(channels: int) -> Tensor:
    """Return the filters of the Haar transform, (4C, 1, 2, 2): the four bands of each channel.

    The transform is orthogonal, so that the same filters take the bands back to pixels.
    """
    return torch.tensor(HAAR).repeat(channels, 1, 1).unsqueeze(1)


def is_haar(filters: Tensor) -> bool:
    """Return whether filters are those of `haar_filters`, but for rounding: the released ones are 0.49999997."""
    expected = haar_filters(len(filters) // BANDS).to(filters)
    return torch.allclose(filters, expected, rtol=0.0, atol=1e-6)


class ChannelScale(nn.Module):
    """Multiply every channel by a learnt number: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, channels: int, scale: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((1, channels, 1, 1), scale))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x


@register_notrace_module  # as torch.fx cannot follow what depends on sizes
class WTEMamba(nn.Module):
    """Scaled SS2D plus a depthwise convolution of the four Haar bands: (B, C, H, W) -> (B, C, H, W).

    Args:
        channels: C.
        kernel_size: Side of the kernel on the bands; in pixels of the map it reaches twice as far.
        ssm_ratio: See `SS2D`.
        d_state: See `SS2D`.
        scan: See `SS2D`.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int,
        *,
        ssm_ratio: float = 2.0,
        d_state: int = 1,
        scan: str = "bidirectional",
    ) -> None:
        super().__init__()
        bands = 4 * channels
        self.wt_filter = nn.Parameter(haar_filters(channels), requires_grad=False)
        self.iwt_filter = nn.Parameter(haar_filters(channels), requires_grad=False)
        self.global_atten = SS2D(channels, ssm_ratio=ssm_ratio, d_state=d_state, scan=scan)
        self.base_scale = ChannelScale(channels, 1.0)
        self.wavelet_convs = nn.ModuleList(
            [nn.Conv2d(bands, bands, kernel_size, padding="same", groups=bands, bias=False)]
        )
        self.wavelet_scale = nn.ModuleList([ChannelScale(bands, 0.1)])

    def forward(self, x: Tensor) -> Tensor:
        y = self.base_scale(self.global_atten(x))
        bands = haar_bands(x, self.wt_filter)
        bands = self.wavelet_convs[0](bands)
        bands = self.wavelet_scale[0](bands)
        return y + haar_pixels(bands, self.iwt_filter, x.shape)


def haar_bands(x: Tensor, filters: Tensor) -> Tensor:
    """Take a map to its Haar bands (DWT); odd sides are padded by a zero on the right and at the bottom.

    Args:
        x: (B, C, H, W).
        filters: See `haar_filters`.

    Returns:
        (B, 4C, ceil(H/2), ceil(W/2)): the four bands of the first channel, of the second, ...
    """
    channels, height, width = x.shape[1:]
    padded = F.pad(x, (0, width % 2, 0, height % 2))
    return F.conv2d(padded, filters, stride=2, groups=channels)


def haar_pixels(bands: Tensor, filters: Tensor, shape: Sequence[int]) -> Tensor:
    """Take Haar bands back to the map (IDWT), without what was padded.

    Args:
        bands: (B, 4C, ceil(H/2), ceil(W/2)).
        filters: See `haar_filters`.
        shape: That of the map, (B, C, H, W).

    Returns:
        (B, C, H, W).
    """
    _, channels, height, width = shape
    return F.conv_transpose2d(bands, filters, stride=2, groups=channels)[..., :height, :width]
