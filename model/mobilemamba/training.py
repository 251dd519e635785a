"""Layers in training on a CPU: whole groups of them as one step of autograd, on the compiled kernels.

PyTorch keeps both what a batch norm reads and what it gives. Here a group keeps what its batch norms read, and the
backward pass normalises again: less to keep, and less to fetch. Where the kernels do not serve (`runs_as_step` says
when), the same layers run one by one.

B batch, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import Sigmoid, SqueezeExcite
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules import module as torch_modules

from ..layers import FFN, ConvBN, Residual
from ..lib_mamba import SCANS, SS2D
from ..lib_mamba.backends import without_autocast
from ..lib_mamba.layer_kernels import serve_training
from .mixer import MRFFI, Mixer, MKDeConv
from .wavelet import ChannelScale, WTEMamba, is_haar

__all__ = ["depthwise_ffn", "expand_and_stride", "mix", "pointwise", "runs_as_step", "squeeze_excite", "stem"]

ops = torch.ops.mobilemamba_kernels


class _Conv(NamedTuple):
    """What a convolution does: ``side`` 0 is any odd one."""

    side: int = 1
    stride: int = 1
    is_depthwise: bool = False
    has_bias: bool = False


# What the groups are made of, in the order of `nn.Module.modules`.
_CONV_BN = (ConvBN, _Conv(), nn.BatchNorm2d)
_STEM_CONV_BN = (ConvBN, _Conv(side=3, stride=2), nn.BatchNorm2d)
_DEPTHWISE = (Residual, ConvBN, _Conv(side=0, is_depthwise=True), nn.BatchNorm2d)
_DEPTHWISE_STRIDE = (ConvBN, _Conv(side=0, stride=2, is_depthwise=True), nn.BatchNorm2d)
_FFN = (Residual, FFN, *_CONV_BN, *_CONV_BN)
_SQUEEZE_EXCITE = (SqueezeExcite, _Conv(has_bias=True), nn.Identity, nn.ReLU, _Conv(has_bias=True), Sigmoid)
_BANDS = (nn.ModuleList, _Conv(side=0, is_depthwise=True), nn.ModuleList, ChannelScale)
_SS2D = (SS2D, *_CONV_BN, _Conv(side=0, is_depthwise=True, has_bias=True), nn.SiLU, nn.LayerNorm, *_CONV_BN)
_LOCAL = (
    *(MKDeConv, _Conv(side=0, is_depthwise=True), nn.BatchNorm2d),
    *(_Conv(side=1, is_depthwise=True), nn.BatchNorm2d),
)
_MIXER = (
    *(Residual, Mixer, MRFFI, WTEMamba, *_SS2D, ChannelScale, *_BANDS),
    *(*_LOCAL, nn.Sequential, nn.ReLU, *_CONV_BN),
)


def runs_as_step(x: Tensor, *layers: tuple[nn.Module, tuple]) -> bool:
    """Return whether layers run on the compiled kernels, as one step of autograd.

    They do where `serve_training` allows it, every layer is in training, made as expected and in float32, and nobody
    watches what is inside by a hook.

    Args:
        x: (B, C, H, W).
        layers: Each with what it must be made of.
    """
    if not serve_training(x) or torch_modules._has_any_global_hook():
        return False
    for layer, kinds in layers:
        modules: list[nn.Module] = []
        _collect(layer, modules)
        if not layer.training or len(modules) != len(kinds) or not all(map(_is_trainable, modules, kinds)):
            return False
    return True


def _collect(module: nn.Module, modules: list[nn.Module]) -> None:
    """Append what `nn.Module.modules` gives, in a fraction of its time; a module in two places comes twice."""
    modules.append(module)
    for child in module._modules.values():
        if child is not None:
            _collect(child, modules)


def _is_trainable(module: nn.Module, kind: type[nn.Module] | _Conv) -> bool:
    """Return whether the kernels do what a module does. Exact types: a subclass may do something else."""
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return False
    for parameter in module._parameters.values():
        if parameter is not None and (parameter.dtype != torch.float32 or not parameter.is_cpu):
            return False
    if isinstance(kind, _Conv):
        return type(module) is nn.Conv2d and _does(module, kind)
    if type(module) is not kind:
        return False
    if isinstance(module, nn.BatchNorm2d):
        return module.training and module.affine and module.track_running_stats
    if isinstance(module, WTEMamba):
        filters = (module.wt_filter, module.iwt_filter)
        return all(is_haar(weight) and not weight.requires_grad for weight in filters)
    return not isinstance(module, SS2D) or len(SCANS[module.scan]) == 1


def _does(conv: nn.Conv2d, kind: _Conv) -> bool:
    side = conv.kernel_size[0]
    if side % 2 == 0 or conv.kernel_size != (side, side) or conv.padding not in ("same", (side // 2, side // 2)):
        return False
    if conv.stride != (kind.stride, kind.stride) or conv.dilation != (1, 1) or conv.padding_mode != "zeros":
        return False
    groups = conv.in_channels if kind.is_depthwise else 1
    if conv.groups != groups or (kind.is_depthwise and conv.out_channels != groups):
        return False
    return kind.side in (0, side) and (conv._parameters["bias"] is not None) == kind.has_bias


class _Step(torch.autograd.Function):
    """A group of layers, by the operators ``<name>_step`` and ``<name>_step_backward`` (csrc/cpu_steps.cpp)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, name: str, norms: Sequence[nn.BatchNorm2d], more: Sequence, *parameters: Tensor
    ) -> Tensor:
        buffers = [norm._buffers for norm in norms]
        running = [kept[key] for kept in buffers for key in ("running_mean", "running_var", "num_batches_tracked")]
        momenta = [-1.0 if norm.momentum is None else norm.momentum for norm in norms]
        operator = getattr(ops, f"{name}_step")
        with without_autocast("cpu"):
            y, saved = operator(x, parameters, running, momenta, [norm.eps for norm in norms], *more)
        ctx.step, ctx.more, ctx.num_parameters = name, more, len(parameters)
        ctx.save_for_backward(x, *parameters, *saved)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *tensors = ctx.saved_tensors
        parameters, saved = tensors[: ctx.num_parameters], tensors[ctx.num_parameters :]
        operator = getattr(ops, f"{ctx.step}_step_backward")
        with without_autocast("cpu"):
            dx, *gradients = operator(grad, x, saved, parameters, *ctx.more)
        return dx, None, None, None, *gradients


def _parameters(*layers: Any) -> list[Tensor]:
    return [parameter for layer in layers for parameter in (layer.c.weight, layer.bn.weight, layer.bn.bias)]


def _run(name: str, x: Tensor, *layers: Any) -> Tensor:
    """Run convolutions with their batch norms as a step."""
    return _Step.apply(x, name, [layer.bn for layer in layers], (), *_parameters(*layers))


def depthwise_ffn(depthwise: Any, ffn: Any, x: Tensor) -> Tensor:
    """Run a residual depthwise convolution and the residual feed-forward after it: (B, C, H, W) -> (B, C, H, W)."""
    if not runs_as_step(x, (depthwise, _DEPTHWISE), (ffn, _FFN)):
        return ffn(depthwise(x))
    return _run("depthwise_ffn", x, depthwise.m, ffn.m.pw1, ffn.m.pw2)


def pointwise(layer: Any, x: Tensor) -> Tensor:
    """Run a 1 x 1 convolution and its batch norm: (B, C, H, W) -> (B, C', H, W)."""
    if not runs_as_step(x, (layer, _CONV_BN)):
        return layer(x)
    return _run("pointwise", x, layer)


def squeeze_excite(layer: Any, x: Tensor) -> Tensor:
    """Run timm's squeeze-excite: (B, C, H, W) -> (B, C, H, W)."""
    if not runs_as_step(x, (layer, _SQUEEZE_EXCITE)) or layer.add_maxpool:
        return layer(x)
    parameters = [parameter for conv in (layer.fc1, layer.fc2) for parameter in (conv.weight, conv.bias)]
    return _Step.apply(x, "squeeze_excite", (), (), *parameters)


def expand_and_stride(expand: Any, stride: Any, x: Tensor) -> Tensor:
    """Run a 1 x 1 and a depthwise convolution of stride 2, each with a ReLU: (B, C, H, W) -> (B, C', H/2, W/2)."""
    if not runs_as_step(x, (expand, _CONV_BN), (stride, _DEPTHWISE_STRIDE)):
        x = F.relu(expand(x), inplace=True)
        return F.relu(stride(x), inplace=True)
    return _run("expand_and_stride", x, expand, stride)


def stem(layers: nn.Sequential, x: Tensor) -> Tensor:
    """Run 3 x 3 convolutions of stride 2 with a ReLU between them: (B, C, H, W) -> (B, C', H/16, W/16)."""
    convs, activations = list(layers)[::2], list(layers)[1::2]
    kinds = [(conv, _STEM_CONV_BN) for conv in convs] + [(activation, (nn.ReLU,)) for activation in activations]
    if runs_as_step(x, *kinds):
        return _run("stem", x, *convs)
    for layer in layers:
        x = layer(x)
    return x


def mix(mixer: Any, x: Tensor) -> Tensor:
    """Run a residual mixer: (B, C, H, W) -> (B, C, H, W)."""
    if not runs_as_step(x, (mixer, _MIXER)):
        return mixer(x)
    attn = mixer.m.attn
    wavelet, local, proj = attn.global_op, attn.local_op, attn.proj[1]
    ss2d = wavelet.global_atten
    parameters = [
        *_parameters(ss2d.in_proj),
        ss2d.conv2d.weight,
        ss2d.conv2d.bias,
        ss2d.x_proj_weight,
        ss2d.dt_projs_weight,
        ss2d.dt_projs_bias,
        ss2d.A_logs,
        ss2d.Ds,
        ss2d.out_norm.weight,
        ss2d.out_norm.bias,
        *_parameters(ss2d.out_proj),
        wavelet.base_scale.weight,
        wavelet.wavelet_convs[0].weight,
        wavelet.wavelet_scale[0].weight,
        local.dwconv3x3.weight,
        local.bn1.weight,
        local.bn1.bias,
        local.dwconv1x1.weight,
        local.bn2.weight,
        local.bn2.bias,
        *_parameters(proj),
    ]
    norms = [ss2d.in_proj.bn, ss2d.out_proj.bn, local.bn1, local.bn2, proj.bn]
    ((_, directions),) = SCANS[ss2d.scan]
    reverse = [int(is_reverse) for is_reverse in directions.values()]
    return _Step.apply(x, "mixer", norms, (attn.split, reverse, ss2d.out_norm.eps), *parameters)
