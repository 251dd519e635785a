"""The leaves of the network.

The attribute names `c`, `bn`, `l` and `m` are those of the released checkpoints.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["FFN", "Activation", "BatchNorm2d", "BatchNormLinear", "ConvBN", "Residual", "count_batch", "is_on_gpu"]


def is_on_gpu(tensor: Tensor) -> bool:
    """Return whether a tensor is on a GPU, where launches count and some layouts and operators are the better ones.

    torch.fx has something else in place of tensors, which is nowhere.
    """
    return isinstance(tensor, Tensor) and tensor.is_cuda


class Activation(IntEnum):
    """The activation after a convolution, by the kernels' numbers."""

    NONE = 0
    RELU = 1
    SILU = 2

    def apply(self, x: Tensor) -> Tensor:
        """Return the activated map, which replaces ``x`` in place."""
        if self is Activation.RELU:
            return F.relu(x, inplace=True)
        return F.silu(x, inplace=True) if self is Activation.SILU else x


class BatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation whose batches a network counts on a GPU, for all of its layers at once: see `count_batch`.

    Attributes:
        is_counted: Whether it belongs to a network that counts. Without, it counts its batches itself.
    """

    is_counted: bool = False

    def _check_input_dim(self, input: Tensor) -> None:
        """Check nothing: the network has checked its images, and torch.fx cannot follow what depends on sizes."""

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and self.is_counted and is_on_gpu(x)) or self.momentum is None:
            return super().forward(x)
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, True, self.momentum, self.eps
        )


def count_batch(norms: Sequence[BatchNorm2d]) -> None:
    """Count a batch in all those that are in training and have a momentum: one launch on a GPU, not one for each."""
    norms = [norm for norm in norms if norm.training and norm.momentum is not None]
    counts = [norm.num_batches_tracked for norm in norms if norm.num_batches_tracked is not None]
    if counts:
        torch._foreach_add_(counts, 1)


class ConvBN(nn.Module):
    """Convolution without bias, then batch normalisation: (B, C, H, W) -> (B, C', H', W').

    Args:
        in_channels: C.
        out_channels: C'.
        kernel_size: Side of the kernel, in pixels.
        stride: Step of the kernel, in pixels.
        padding: Zeros around the input, in pixels.
        groups: Groups of channels; C for a depthwise convolution.
        bn_weight: Initial weight of the normalisation; with 0 a residual branch starts as zero.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        kernel_size: int = 1,
        stride: int = 1,
        padding: int = 0,
        groups: int = 1,
        bn_weight: float = 1.0,
    ) -> None:
        super().__init__()
        self.c = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, groups=groups, bias=False)
        self.bn = BatchNorm2d(out_channels)
        nn.init.constant_(self.bn.weight, bn_weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.c(x))


class FFN(nn.Module):
    """Pointwise to twice the channels, ReLU, pointwise back: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.pw1 = ConvBN(channels, 2 * channels)
        self.pw2 = ConvBN(2 * channels, channels, bn_weight=0.0)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.pw1(x), inplace=True)
        return self.pw2(x)


class BatchNormLinear(nn.Module):
    """Batch normalisation, then a linear classifier: (B, C) -> (B, num_classes)."""

    def __init__(self, in_features: int, num_classes: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(in_features)
        self.l = nn.Linear(in_features, num_classes)
        nn.init.trunc_normal_(self.l.weight, std=0.02)
        nn.init.zeros_(self.l.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.l(self.bn(x))


class Residual(nn.Module):
    """Add a branch to its input."""

    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.m = branch

    def forward(self, x: Tensor) -> Tensor:
        return x + self.m(x)
