"""Folds that lose nothing at inference: fewer, larger operators with the same result (paper, section 4.1)."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn

from ..layers import BatchNormLinear, ConvBN, Residual
from ..lib_mamba import SS2D
from .mixer import MKDeConv
from .wavelet import WTEMamba

__all__ = ["fuse"]

Network = TypeVar("Network", bound=nn.Module)


@torch.no_grad()
def fuse(network: Network) -> Network:
    """Fold a MobileMamba, or a part of one, in place.

    Args:
        network: Weights already loaded. Folding twice changes nothing.

    Returns:
        The same module, in evaluation mode.
    """
    network.eval()
    for name, child in list(network.named_children()):
        setattr(network, name, _fold(fuse(child)))
    if getattr(network, "distillation", False):
        network.head = _average(network.head, network.head_dist)
        del network.head_dist
        network.distillation = False
    return network


def _fold(module: nn.Module) -> nn.Module:
    """Return what replaces a module whose children are folded already."""
    if isinstance(module, ConvBN):
        return _conv_bn(module.c, module.bn)
    if isinstance(module, BatchNormLinear):
        return _bn_linear(module.bn, module.l)
    if isinstance(module, Residual):
        return _residual(module)
    if isinstance(module, MKDeConv):
        pointwise = ChannelAffine(_conv_bn(module.dwconv1x1, module.bn2))
        return nn.Sequential(_conv_bn(module.dwconv3x3, module.bn1), nn.ReLU(inplace=True), pointwise)
    if isinstance(module, WTEMamba):
        _scales(module)
    if isinstance(module, SS2D):
        _lay_out_time_steps(module)
    return module


class ChannelAffine(nn.Module):
    """Scale and shift every channel, as a depthwise 1 x 1 convolution does: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.weight = nn.Parameter(conv.weight.view(1, -1, 1, 1), requires_grad=False)
        self.bias = nn.Parameter(conv.bias.view(1, -1, 1, 1), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.bias.to(x.dtype), x, self.weight.to(x.dtype))


def _affine(bn: nn.BatchNorm1d | nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Return the scale and shift, (C,) each in float64, that the normalisation applies in evaluation mode."""
    scale = bn.weight.double() / (bn.running_var.double() + bn.eps).sqrt()
    return scale, bn.bias.double() - bn.running_mean.double() * scale


def _conv_bn(conv: nn.Conv2d, bn: nn.BatchNorm2d) -> nn.Conv2d:
    scale, shift = _affine(bn)
    return _with_weights(conv, conv.weight.double() * scale.view(-1, 1, 1, 1), shift)


def _with_weights(conv: nn.Conv2d, weight: Tensor, bias: Tensor) -> nn.Conv2d:
    """Return a convolution like ``conv`` with other weights, in its type, on its device, in its memory layout."""
    like = conv.weight
    folded = nn.Conv2d(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,
        conv.stride,
        conv.padding,
        groups=conv.groups,
        device="meta",
    )
    folded.weight = nn.Parameter(torch.empty_like(like).copy_(weight), requires_grad=False)
    folded.bias = nn.Parameter(bias.to(like.dtype), requires_grad=False)
    return folded.eval()


def _bn_linear(bn: nn.BatchNorm1d, linear: nn.Linear) -> nn.Linear:
    scale, shift = _affine(bn)
    weight = linear.weight.double()
    return _linear(weight * scale, linear.bias.double() + weight @ shift, linear)


def _linear(weight: Tensor, bias: Tensor, like: nn.Linear) -> nn.Linear:
    folded = nn.Linear(like.in_features, like.out_features, device="meta")
    folded.weight = nn.Parameter(weight.to(like.weight.dtype), requires_grad=False)
    folded.bias = nn.Parameter(bias.to(like.weight.dtype), requires_grad=False)
    return folded.eval()


def _average(head: nn.Module, head_dist: nn.Module) -> nn.Module:
    """Return one linear layer for the mean of two; without classes there is nothing to average."""
    if not isinstance(head, nn.Linear):
        return head
    weight = (head.weight.double() + head_dist.weight.double()) / 2
    return _linear(weight, (head.bias.double() + head_dist.bias.double()) / 2, head)


def _residual(module: Residual) -> nn.Module:
    """Fold a residual depthwise convolution into its own centre tap."""
    conv = module.m
    if not isinstance(conv, nn.Conv2d) or conv.groups != conv.in_channels:
        return module
    height, width = conv.kernel_size
    weight = conv.weight.double()
    weight[:, :, height // 2, width // 2] += 1
    return _with_weights(conv, weight, conv.bias)


def _scales(module: WTEMamba) -> None:
    """Fold the branch scales into the convolutions before them."""
    conv, scale = module.global_atten.out_proj, module.base_scale
    if isinstance(scale, nn.Identity):
        return
    factor = scale.weight.double().flatten()
    module.global_atten.out_proj = _with_weights(
        conv, conv.weight.double() * factor.view(-1, 1, 1, 1), conv.bias.double() * factor
    )
    module.base_scale = nn.Identity()
    band_conv, band_scale = module.wavelet_convs[0], module.wavelet_scale[0]
    band_conv.weight.copy_(band_conv.weight.double() * band_scale.weight.double().view(-1, 1, 1, 1))
    module.wavelet_scale[0] = nn.Identity()


def _lay_out_time_steps(module: SS2D) -> None:
    """Put the channels of dt_projs_weight (K, D, R) side by side in memory, as kernels read them: no copy a call."""
    weight = module.dt_projs_weight
    weight.data = weight.data.transpose(1, 2).contiguous().transpose(1, 2)
