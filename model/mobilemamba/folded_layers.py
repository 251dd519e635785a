"""Layers of a folded network: convolutions with the bias, activation and residual that belong to them.

Each runs on the compiled kernels where these serve (`cpu_layers`), and on PyTorch everywhere else.
B batch, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers import Activation
from ..lib_mamba import SS2D, cpu_layers, layouts
from ..lib_mamba.backends import without_autocast
from .wavelet import haar_bands, haar_pixels, is_haar

__all__ = [
    "FoldedConvs",
    "FoldedDepthwise",
    "FoldedFFN",
    "FoldedMixer",
    "FoldedPointwise",
    "FoldedSqueezeExcite",
    "FoldedWTEMamba",
    "is_folded",
]


def is_folded(network: nn.Module) -> bool:
    """Return whether a MobileMamba is folded."""
    return isinstance(network.patch_embed, FoldedConvs)


def _frozen(tensor: Tensor | None) -> nn.Parameter:
    assert tensor is not None
    return nn.Parameter(tensor.detach(), requires_grad=False)


class _Packed(nn.Module):
    """A layer that keeps a copy of its weights in the layout of the kernels.

    The copies follow the weights wherever these go, and are neither in the state dict nor exported.
    """

    def __init__(self) -> None:
        super().__init__()
        self.register_load_state_dict_post_hook(_pack_again)

    def pack(self) -> None:
        """Make the copies, where a kernel reads them."""
        raise NotImplementedError

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Packed:
        super()._apply(fn, recurse)
        self.pack()
        return self


def _pack_again(layer: _Packed, _incompatible_keys: object) -> None:
    layer.pack()


class FoldedPointwise(_Packed):
    """1 x 1 convolution as a product of matrices: (B, C, H, W) -> (B, C', H, W), plus a residual if one is given.

    Args:
        conv: 1 x 1, of stride 1, with bias.
        activation: Applied before the residual is added.
    """

    def __init__(self, conv: nn.Conv2d, activation: Activation = Activation.NONE) -> None:
        super().__init__()
        self.activation = activation
        self.weight = _frozen(conv.weight.flatten(1))
        self.bias = _frozen(conv.bias)
        self.pack()

    def pack(self) -> None:
        self.panels = layouts.columns(self.weight.t())

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if (kernels := cpu_layers.serve(x)) is not None:
            return kernels.pointwise(x, self.panels, self.bias, residual, int(self.activation))
        y = F.linear(x.permute(0, 2, 3, 1), self.weight, self.bias).permute(0, 3, 1, 2)
        y = self.activation.apply(y)
        return y if residual is None else y + residual


class FoldedDepthwise(_Packed):
    """Depthwise convolution: (B, C, H, W) -> (B, C, H', W'), then optionally scaled and shifted.

    Args:
        conv: Depthwise, with a square kernel and bias.
        activation: Applied to the result.
        affine: Depthwise 1 x 1 convolution with bias that follows the activation.
    """

    def __init__(
        self, conv: nn.Conv2d, activation: Activation = Activation.NONE, *, affine: nn.Conv2d | None = None
    ) -> None:
        super().__init__()
        self.activation = activation
        self.stride, self.padding = conv.stride[0], conv.padding[0]
        self.weight = _frozen(conv.weight)
        self.bias = _frozen(conv.bias)
        self.scale = None if affine is None else _frozen(affine.weight.flatten())
        self.shift = None if affine is None else _frozen(affine.bias)
        self.pack()

    def pack(self) -> None:
        self.taps = layouts.depthwise(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        if (kernels := cpu_layers.serve(x)) is not None:
            affine = (self.scale, self.shift, self.stride, self.padding, int(self.activation))
            return kernels.depthwise(x, self.taps, self.bias, *affine)
        groups = len(self.weight)
        y = self.activation.apply(F.conv2d(x, self.weight, self.bias, self.stride, self.padding, groups=groups))
        if self.scale is None or self.shift is None:
            return y
        # Multiplied, not convolved: some CPUs and sizes would do a depthwise 1 x 1 channel by channel.
        return torch.addcmul(self.shift.to(y.dtype).view(-1, 1, 1), y, self.scale.to(y.dtype).view(-1, 1, 1))


class FoldedFFN(nn.Module):
    """Feed-forward with its residual, and the depthwise convolution before it: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, depthwise: FoldedDepthwise | None, widen: FoldedPointwise, narrow: FoldedPointwise) -> None:
        super().__init__()
        self.depthwise = depthwise
        self.widen = widen
        self.narrow = narrow

    def forward(self, x: Tensor) -> Tensor:
        if (kernels := cpu_layers.serve(x)) is not None:
            before = (None, None) if self.depthwise is None else (self.depthwise.taps, self.depthwise.bias)
            products = (self.widen.panels, self.widen.bias, self.narrow.panels, self.narrow.bias)
            return kernels.ffn(x, *before, *products)
        if self.depthwise is not None:
            x = self.depthwise(x)
        return self.narrow(self.widen(x), x)


class FoldedConvs(_Packed):
    """Convolutions over all channels, one after the other, a ReLU between them: (B, C, H, W) -> (B, C', H', W').

    Args:
        convs: With square kernels alike, and bias.
    """

    def __init__(self, convs: Sequence[nn.Conv2d]) -> None:
        super().__init__()
        first = convs[0]
        self.shape = (first.kernel_size[0], first.stride[0], first.padding[0])
        self.weights = nn.ParameterList(_frozen(conv.weight) for conv in convs)
        self.biases = nn.ParameterList(_frozen(conv.bias) for conv in convs)
        self.pack()

    def pack(self) -> None:
        # As matrices (height * width * C, C').
        self.panels = [layouts.columns(weight.permute(2, 3, 1, 0).flatten(0, 2)) for weight in self.weights]

    def forward(self, x: Tensor) -> Tensor:
        if (kernels := cpu_layers.serve(x)) is not None:
            return kernels.convs(x, self.panels, list(self.biases), *self.shape)
        _, stride, padding = self.shape
        for index, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = F.conv2d(F.relu(x, inplace=True) if index else x, weight, bias, stride, padding)
        return x


class FoldedSqueezeExcite(nn.Module):
    """Squeeze-excite: every channel times a gate made of the means of all: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, reduce: FoldedPointwise, expand: FoldedPointwise) -> None:
        super().__init__()
        self.reduce = reduce
        self.expand = expand

    def forward(self, x: Tensor) -> Tensor:
        gate = x.mean((2, 3), keepdim=True)
        gate = self.reduce(gate)
        gate = self.expand(gate)
        return x * gate.sigmoid()


class FoldedWTEMamba(_Packed):
    """Scan plus the wavelet branch, with their scales folded: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, scan: SS2D, wt_filter: Tensor, iwt_filter: Tensor, bands: nn.Conv2d) -> None:
        super().__init__()
        self.global_atten = scan
        self.wt_filter = _frozen(wt_filter)
        self.iwt_filter = _frozen(iwt_filter)
        self.bands = bands
        self.has_haar_filters = is_haar(wt_filter) and is_haar(iwt_filter)
        self.pack()

    def pack(self) -> None:
        self.taps = layouts.bands(self.bands.weight)

    def forward(self, x: Tensor) -> Tensor:
        if self.has_haar_filters and (kernels := cpu_layers.serve(x)) is not None:
            with without_autocast("cpu"):
                return kernels.wavelet(x, self.taps, self.global_atten(x))
        y = self.global_atten(x)
        bands = haar_bands(x, self.wt_filter)
        bands = self.bands(bands)
        return y + haar_pixels(bands, self.iwt_filter, x.shape)


class FoldedMixer(nn.Module):
    """The three branches, their projection and the residual around them: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(
        self, split: tuple[int, int, int], global_op: nn.Module, local_op: nn.Module, proj: FoldedPointwise
    ) -> None:
        super().__init__()
        self.split = split
        self.global_op = global_op
        self.local_op = local_op
        self.proj = proj

    def forward(self, x: Tensor) -> Tensor:
        x_global, x_local, x_identity = x.split(self.split, dim=1)
        x_global = self.global_op(x_global)
        x_local = self.local_op(x_local)
        y = torch.cat([x_global, x_local, x_identity], dim=1)
        return self.proj(F.relu(y, inplace=True), x)
