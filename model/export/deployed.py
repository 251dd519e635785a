"""What stands before and behind the network in an exported file: preprocessing, and what becomes of its logits."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..mobilemamba import MobileMamba
from .portable import Portable
from .request import ExportRequest

__all__ = ["TIE", "Deployed", "Preprocess", "center_crop"]

TIE = 1e-3  # pixels: a side halfway between two is rounded up, whatever a runtime's rounding errors


@torch.fx.wrap
def center_crop(x: Tensor, size: tuple[int, int], crop_pct: float) -> Tensor:
    """Return the middle of images, ``crop_pct`` of their shorter side, in the proportions of ``size``.

    Args:
        x: (B, C, H, W).
        size: Height and width that the images will have, in pixels.
        crop_pct: From 0 to 1.
    """
    height, width = x.shape[2:]
    scale = crop_pct * min(height / size[0], width / size[1])
    sides = [max(1, round(scale * side + TIE)) for side in size]
    top, left = (height - sides[0]) // 2, (width - sides[1]) // 2
    return x[:, :, top : top + sides[0], left : left + sides[1]]


class Preprocess(nn.Module):
    """uint8 images (B, H, W, C) of any size to the network's input (B, C, H', W')."""

    scale: Tensor
    shift: Tensor

    def __init__(self, request: ExportRequest) -> None:
        super().__init__()
        self.size = request.size
        self.crop_pct = request.crop_pct
        mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (request.mean, request.std))
        self.interpolation = request.interpolation
        self.is_bgr = request.is_bgr
        self.register_buffer("scale", 1 / (255 * std))
        self.register_buffer("shift", -mean / std)

    def forward(self, images: Tensor) -> Tensor:
        x = images.permute(0, 3, 1, 2)
        x = center_crop(x, self.size, self.crop_pct).to(torch.float32)
        x = F.interpolate(x, self.size, mode=self.interpolation, antialias=True)
        if self.is_bgr:
            x = x.flip(1)
        return x * self.scale + self.shift


class Deployed(nn.Module):
    """A network with what stands before and behind it in the file, in portable form or not.

    Args:
        network: The network.
        request: What is wanted.
    """

    def __init__(self, network: MobileMamba | Portable, request: ExportRequest) -> None:
        super().__init__()
        self.preprocess = Preprocess(request) if request.preprocess else nn.Identity()
        self.network: MobileMamba | Portable = network
        self.gives_features = request.features
        self.gives_probabilities = request.softmax

    def forward(self, images: Tensor) -> Any:
        """Return logits or probabilities (B, num_classes), or three maps."""
        x = self.preprocess(images)
        if self.gives_features:
            return tuple(self._features(x))
        y: Tensor = self.network(x)
        return y.softmax(1) if self.gives_probabilities else y

    def _features(self, x: Tensor) -> list[Tensor]:
        if isinstance(self.network, Portable):
            return self.network.features(x)
        maps = self.network.forward_intermediates(x, indices=3, intermediates_only=True)
        assert isinstance(maps, list)
        return maps
