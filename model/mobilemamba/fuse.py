"""Lossless folds for inference: fewer, larger operators with the same result (paper, section 4.1)."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..layers import FFN, Activation, BatchNormLinear, ConvBN, Residual
from .blocks import Block, PatchMerging, Stem
from .folded_layers import (
    FoldedBlock,
    FoldedConvs,
    FoldedDepthwise,
    FoldedFFN,
    FoldedLinear,
    FoldedMixer,
    FoldedPatchMerging,
    FoldedPointwise,
    FoldedSqueezeExcite,
    FoldedSS2D,
    FoldedWTEMamba,
)
from .mixer import Mixer, MKDeConv
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
    """Return the replacement of a module whose children are folded already: to plain convolutions, up to here."""
    if isinstance(module, ConvBN):
        return _conv_bn(module.c, module.bn)
    if isinstance(module, BatchNormLinear):
        return _bn_linear(module.bn, module.l)
    if isinstance(module, MKDeConv):
        affine = _conv_bn(module.dwconv1x1, module.bn2)
        return FoldedDepthwise(_conv_bn(module.dwconv3x3, module.bn1), Activation.RELU, affine=affine)
    if isinstance(module, WTEMamba):
        return _wte_mamba(module)
    if isinstance(module, PatchMerging):
        return _patch_merging(module)
    if isinstance(module, Residual):
        return _residual(module)
    if isinstance(module, Block):
        return _block(module)
    return _sequential(module) if isinstance(module, nn.Sequential) else module


def _layer(conv: nn.Conv2d, activation: Activation = Activation.NONE) -> nn.Module:
    return FoldedPointwise(conv, activation) if conv.groups == 1 else FoldedDepthwise(conv, activation)


def _sequential(modules: nn.Sequential) -> nn.Module:
    """Fold the stem as a whole; elsewhere single convolutions, and a depthwise one with the feed-forward after it."""
    if isinstance(modules, Stem):
        convs = [module for module in modules if isinstance(module, nn.Conv2d)]
        return FoldedConvs(convs, Activation.RELU if isinstance(modules[-1], nn.ReLU) else Activation.NONE).eval()
    layers: list[nn.Module] = []
    for module in modules:
        if isinstance(module, FoldedFFN) and layers and isinstance(layers[-1], FoldedDepthwise):
            module.set_depthwise(layers.pop())
        layers.append(_layer(module) if isinstance(module, nn.Conv2d) else module)
    return nn.Sequential(*layers).eval()


def _block(block: Any) -> FoldedBlock:
    """Give either feed-forward the depthwise convolution before it, and the last one the residual around them all."""
    block.ffn0.set_depthwise(block.dw0)
    block.ffn1.set_depthwise(block.dw1)
    return FoldedBlock(block.ffn0, block.mixer, block.ffn1).eval()


def _patch_merging(module: PatchMerging) -> FoldedPatchMerging:
    excite = FoldedSqueezeExcite(FoldedPointwise(module.se.fc1, Activation.RELU), FoldedPointwise(module.se.fc2))
    return FoldedPatchMerging(
        _layer(module.conv1, Activation.RELU), _layer(module.conv2, Activation.RELU), excite, _layer(module.conv3)
    ).eval()


def _residual(module: Residual) -> nn.Module:
    """Give a branch its residual: a depthwise convolution in its own centre tap, the others as they end."""
    branch = module.m
    if isinstance(branch, FFN):
        return FoldedFFN(None, FoldedPointwise(branch.pw1, Activation.RELU), FoldedPointwise(branch.pw2)).eval()
    if isinstance(branch, Mixer):
        mixer = branch.attn
        return FoldedMixer(mixer.split, mixer.global_op, mixer.local_op, mixer.proj[1]).eval()
    height, width = branch.kernel_size
    weight = branch.weight.double()
    weight[:, :, height // 2, width // 2] += 1
    return FoldedDepthwise(_with_weights(branch, weight, branch.bias)).eval()


def _wte_mamba(module: WTEMamba) -> FoldedWTEMamba:
    """Fold the branch scales into the convolutions before them."""
    scan, bands = module.global_atten, module.wavelet_convs[0]
    factor = module.base_scale.weight.double().flatten()
    weight = scan.out_proj.weight.double() * factor.view(-1, 1, 1, 1)
    out_proj = FoldedPointwise(_with_weights(scan.out_proj, weight, scan.out_proj.bias.double() * factor))
    bands.weight.copy_(bands.weight.double() * module.wavelet_scale[0].weight.double().view(-1, 1, 1, 1))
    scan = FoldedSS2D(scan, out_proj)
    return FoldedWTEMamba(scan, module.wt_filter, module.iwt_filter, bands.requires_grad_(False)).eval()


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


def _linear(weight: Tensor, bias: Tensor, like: nn.Linear) -> FoldedLinear:
    return FoldedLinear(weight.to(like.weight.dtype), bias.to(like.weight.dtype)).eval()


def _average(head: nn.Module, head_dist: nn.Module) -> nn.Module:
    """Return one linear layer for the mean of two; without classes there is nothing to average."""
    if not isinstance(head, nn.Linear):
        return head
    weight = (head.weight.double() + head_dist.weight.double()) / 2
    return _linear(weight, (head.bias.double() + head_dist.bias.double()) / 2, head)
