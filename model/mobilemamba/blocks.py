"""Feed-forward, block, downsampling: the parts of the stages (paper, section 3.1).

The names `pw1`, `pw2`, `conv1..3`, `se`, `dw0`, `ffn0`, `mixer`, `dw1`, `ffn1` are those of the released checkpoints.
B batch, C channels, H height, W width.

Each forward is the mathematics. Where two lines stand at its top, they take a faster way to the same result if there is
one (`steps`).
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch.nn.functional as F
from timm.layers import DropPath, SqueezeExcite
from torch import Tensor, nn

from ..layers import FFN, ConvBN, Residual
from . import steps
from .mixer import MRFFI, Mixer

__all__ = ["Block", "DepthwiseFFN", "PatchMerging", "Stem", "depthwise", "downsample", "patch_embed"]


def depthwise(channels: int) -> Residual:
    """Return a residual depthwise 3 x 3 convolution."""
    return Residual(ConvBN(channels, channels, kernel_size=3, padding=1, groups=channels, bn_weight=0.0))


class DepthwiseFFN(steps.StepGroup, nn.Sequential):
    """A residual depthwise convolution, then a residual feed-forward: (B, C, H, W) -> (B, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        if (y := steps.depthwise_ffn(self, x)) is not None:
            return y
        return super().forward(x)


class Block(steps.StepGroup):
    """Depthwise, FFN, mixer, depthwise, FFN, each residual, within one more residual.

    (B, C, H, W) -> (B, C, H, W).

    Args:
        channels: C.
        drop_path: Probability with which the block is left out for an image in training.
        mixer: Arguments of `MRFFI`.
    """

    def __init__(self, channels: int, *, drop_path: float = 0.0, **mixer: Any) -> None:
        super().__init__()
        self.dw0 = depthwise(channels)
        self.ffn0 = Residual(FFN(channels))
        self.mixer = Residual(Mixer(MRFFI(channels, **mixer)))
        self.dw1 = depthwise(channels)
        self.ffn1 = Residual(FFN(channels))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        if (y := steps.block(self, x)) is not None:
            return y
        y = self.dw0(x)
        y = self.ffn0(y)
        y = self.mixer(y)
        y = self.dw1(y)
        y = self.ffn1(y)
        return x + self.drop_path(y)


class PatchMerging(steps.StepGroup):
    """Inverted bottleneck of stride 2 with squeeze-excite: (B, C, H, W) -> (B, C', ceil(H/2), ceil(W/2))."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        hidden = 4 * in_channels
        self.conv1 = ConvBN(in_channels, hidden)
        self.conv2 = ConvBN(hidden, hidden, kernel_size=3, stride=2, padding=1, groups=hidden)
        self.se = SqueezeExcite(hidden, rd_ratio=0.25)
        self.conv3 = ConvBN(hidden, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        if (y := steps.patch_merging(self, x)) is not None:
            return y
        x = F.relu(self.conv1(x), inplace=True)
        x = F.relu(self.conv2(x), inplace=True)
        x = self.se(x)
        return self.conv3(x)


def downsample(in_channels: int, out_channels: int) -> list[nn.Module]:
    """Return the layers between two stages: (B, C, H, W) -> (B, C', ceil(H/2), ceil(W/2))."""
    before = DepthwiseFFN(depthwise(in_channels), Residual(FFN(in_channels)))
    after = DepthwiseFFN(depthwise(out_channels), Residual(FFN(out_channels)))
    return [before, PatchMerging(in_channels, out_channels), after]


class Stem(steps.StepGroup, nn.Sequential):
    """3 x 3 convolutions of stride 2 with a ReLU between them: (B, C, H, W) -> (B, C', H/16, W/16)."""

    def forward(self, x: Tensor) -> Tensor:
        if (y := steps.stem(self, x)) is not None:
            return y
        return super().forward(x)

    def forward_intermediates(self, x: Tensor) -> list[Tensor]:
        """Return the map after each convolution and its ReLU, at strides 2, 4, 8 and 16."""
        maps: list[Tensor] = []
        for layer in self:
            x = layer(x)
            if isinstance(layer, nn.ReLU):
                maps[-1] = x
            else:
                maps.append(x)
        return maps


def patch_embed(in_channels: int, channels: int) -> Stem:
    """Return the stem: four 3 x 3 convolutions of stride 2, (B, C_in, H, W) -> (B, C, ceil(H/16), ceil(W/16))."""
    widths = [in_channels, channels // 8, channels // 4, channels // 2, channels]
    layers: list[nn.Module] = []
    for narrow, wide in pairwise(widths):
        layers += [ConvBN(narrow, wide, kernel_size=3, stride=2, padding=1), nn.ReLU(inplace=True)]
    return Stem(*layers[:-1])
