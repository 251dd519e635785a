"""WTE-Mamba: a global scan, enhanced by a convolution in the wavelet domain (paper, section 3.3).

The names `global_atten`, `wavelet_convs`, `wavelet_scale`, `base_scale`, `wt_filter`, `iwt_filter` are those of the
released checkpoints. B batch, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers import is_on_gpu
from ..lib_mamba import SS2D

__all__ = [
    "ChannelScale",
    "WTEMamba",
    "haar_bands",
    "haar_filters",
    "haar_pixels",
    "haar_signs",
    "is_haar",
    "pixels_of_sums",
    "sums_of_pixels",
]

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
    if filters.is_meta:
        return False
    expected = haar_filters(len(filters) // BANDS).to(filters)
    return torch.allclose(filters, expected, rtol=0.0, atol=1e-6)


class ChannelScale(nn.Module):
    """Multiply every channel by a learnt number: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, channels: int, scale: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((1, channels, 1, 1), scale))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x


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
        self.has_haar_filters = True
        self.register_load_state_dict_post_hook(_look_at_filters)

    def settle_filters(self) -> None:
        """Fix the filters again, and note whether they are Haar's: for loaders that go past `load_state_dict`."""
        self.wt_filter.requires_grad_(False)
        self.iwt_filter.requires_grad_(False)
        _look_at_filters(self, None)

    def forward(self, x: Tensor) -> Tensor:
        y = self.base_scale(self.global_atten(x))
        bands = self._to_bands(x)
        bands = self.wavelet_convs[0](bands)
        bands = self.wavelet_scale[0](bands)
        return y + self._to_pixels(bands, x.shape)

    def _to_bands(self, x: Tensor) -> Tensor:
        if self._takes_sums(x):
            return 0.5 * sums_of_pixels(x, haar_signs(self.wt_filter).to(x.dtype))
        return haar_bands(x, self.wt_filter)

    def _to_pixels(self, bands: Tensor, shape: Sequence[int]) -> Tensor:
        if self._takes_sums(bands):
            return 0.5 * pixels_of_sums(bands, haar_signs(self.iwt_filter).to(bands.dtype), shape)
        return haar_pixels(bands, self.iwt_filter, shape)

    def _takes_sums(self, x: Tensor) -> bool:
        """Return whether sums replace the convolutions: cuDNN may be slow at these, the more so at their gradients."""
        return is_on_gpu(x) and self.has_haar_filters


def _look_at_filters(wavelet: WTEMamba, _incompatible_keys: object) -> None:
    """Note whether loaded filters are Haar's; once, as a look at a GPU's memory waits for the GPU."""
    wavelet.has_haar_filters = is_haar(wavelet.wt_filter) and is_haar(wavelet.iwt_filter)


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


def haar_signs(filters: Tensor) -> Tensor:
    """Return (1, -1), of the type and on the device of `haar_filters`: how a sum and a difference weigh neighbours."""
    return filters[2, 0, 0].sign()


def sums_of_pixels(x: Tensor, signs: Tensor) -> Tensor:
    """Return twice `haar_bands`, as sums and differences of neighbouring pixels: of columns, then of rows.

    Element-wise operations alone, which a compiler fuses with their neighbours.

    Args:
        x: (B, C, H, W).
        signs: See `haar_signs`; in the type of ``x``.

    Returns:
        (B, 4C, ceil(H/2), ceil(W/2)), channels-last.
    """
    height, width = x.shape[2:]
    if height % 2 or width % 2:
        x = F.pad(x, (0, width % 2, 0, height % 2))
    pixels = x.permute(0, 2, 3, 1).unflatten(2, (-1, 2)).unflatten(1, (-1, 2))  # (B, H/2, 2, W/2, 2, C)
    left, right = pixels.unsqueeze(-1).unbind(4)
    pairs = torch.addcmul(left, signs, right)  # (B, H/2, 2, W/2, C, 2)
    upper, lower = pairs.unsqueeze(-1).unbind(2)
    bands = torch.addcmul(upper, signs, lower)  # (B, H/2, W/2, C, 2, 2)
    return bands.flatten(3).permute(0, 3, 1, 2)


def pixels_of_sums(bands: Tensor, signs: Tensor, shape: Sequence[int]) -> Tensor:
    """Return twice `haar_pixels`, as sums and differences of bands: to rows, then to columns.

    Args:
        bands: (B, 4C, ceil(H/2), ceil(W/2)).
        signs: See `haar_signs`; in the type of ``bands``.
        shape: That of the map, (B, C, H, W).

    Returns:
        (B, C, H, W), channels-last but for what is cut off.
    """
    _, channels, height, width = shape
    parts = bands.permute(0, 2, 3, 1).unflatten(3, (channels, 2, 2))  # (B, H/2, W/2, C, 2, 2)
    even, odd = parts.unsqueeze(2).unbind(-1)
    rows = torch.addcmul(even, signs.view(2, 1, 1, 1), odd)  # (B, H/2, 2, W/2, C, 2)
    even, odd = rows.unsqueeze(4).unbind(-1)
    pixels = torch.addcmul(even, signs.view(2, 1), odd)  # (B, H/2, 2, W/2, 2, C)
    return pixels.flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)[..., :height, :width]
