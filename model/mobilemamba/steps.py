"""Groups of layers in training on a CPU, each as one step of autograd on the compiled kernels.

PyTorch keeps both the input and the output of a batch norm. A step keeps only the input, and its backward pass
normalises again: less to keep, and less to fetch. What a group computes is written in its own forward; a function here
computes the same, or returns None where the kernels do not serve, and then that forward runs.

B batch, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from timm.layers import DropPath, Sigmoid, SqueezeExcite
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules import module as torch_modules
from torch.utils.hooks import RemovableHandle

from ..layers import FFN, BatchNorm2d, ConvBN, Residual
from ..lib_mamba import SCANS, SS2D, cpu_layers
from ..lib_mamba.backends import without_autocast
from .mixer import MRFFI, Mixer, MKDeConv
from .wavelet import ChannelScale, WTEMamba, is_haar

__all__ = ["StepGroup", "block", "depthwise_ffn", "patch_merging", "stem"]

ops = torch.ops.mobilemamba_kernels


class StepGroup(nn.Module):
    """A group of layers that can run as steps.

    A group that does has checked its layers once, and checks them again after `train`, `eval`, a conversion, a new hook
    or a replaced layer; one that cannot checks them at each forward. (Of settings of its layers that are changed in
    place, such as a dilation, it learns at the next `train`.)
    """

    _decision: _Decision | None = None

    def train(self, mode: bool = True) -> StepGroup:
        self._decision = None
        return super().train(mode)

    def _apply(self, *arguments: Any, **options: Any) -> StepGroup:
        self._decision = None
        return super()._apply(*arguments, **options)


def stem(group: Any, x: Tensor) -> Tensor | None:
    """Run the stem, (B, C, H, W) -> (B, C', H/16, W/16), or return None."""
    if not _runs_as_steps(group, x, _STEM):
        return None
    return _run("stem", x, *(layer for layer in group if isinstance(layer, ConvBN)))


def depthwise_ffn(group: Any, x: Tensor) -> Tensor | None:
    """Run a residual depthwise convolution and the residual feed-forward after it, or return None."""
    if not _runs_as_steps(group, x, (*_DEPTHWISE, *_FFN)):
        return None
    return _depthwise_ffn(group[0], group[1], x)


def patch_merging(group: Any, x: Tensor) -> Tensor | None:
    """Run the downsampling between two stages, (B, C, H, W) -> (B, C', H/2, W/2), or return None."""
    if not _runs_as_steps(group, x, _PATCH_MERGING):
        return None
    x = _run("expand_and_stride", x, group.conv1, group.conv2)
    squeeze, excite = group.se.fc1, group.se.fc2
    x = _Step.apply(x, "squeeze_excite", (), (), squeeze.weight, squeeze.bias, excite.weight, excite.bias)
    return _run("pointwise", x, group.conv3)


def block(group: Any, x: Tensor) -> Tensor | None:
    """Run a block, (B, C, H, W) -> (B, C, H, W), or return None."""
    if not _runs_as_steps(group, x, _BLOCK):
        return None
    y = _depthwise_ffn(group.dw0, group.ffn0, x)
    y = _mixer(group.mixer, y)
    y = _depthwise_ffn(group.dw1, group.ffn1, y)
    return x + group.drop_path(y)


def _depthwise_ffn(depthwise: Any, ffn: Any, x: Tensor) -> Tensor:
    return _run("depthwise_ffn", x, depthwise.m, ffn.m.pw1, ffn.m.pw2)


def _mixer(mixer: Any, x: Tensor) -> Tensor:
    attn = mixer.m.attn
    wavelet, local, proj = attn.global_op, attn.local_op, attn.proj[1]
    ss2d = wavelet.global_atten
    parameters = [  # in the order of csrc/layers/mixer_step.cpp
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


def _run(name: str, x: Tensor, *layers: Any) -> Tensor:
    """Run convolutions with their batch norms as a step."""
    parameters = [parameter for layer in layers for parameter in _parameters(layer)]
    return _Step.apply(x, name, [layer.bn for layer in layers], (), *parameters)


def _parameters(layer: Any) -> tuple[Tensor, Tensor, Tensor]:
    return layer.c.weight, layer.bn.weight, layer.bn.bias


class _Step(torch.autograd.Function):
    """A step, by the operators ``<name>_step`` and ``<name>_step_backward`` (csrc/layers)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, name: str, norms: Sequence[nn.BatchNorm2d], settings: Sequence, *parameters: Tensor
    ) -> Tensor:
        buffers = [norm._buffers for norm in norms]
        running = [kept[key] for kept in buffers for key in ("running_mean", "running_var", "num_batches_tracked")]
        # Without a momentum, statistics are means over all batches: the operators take a negative one for that.
        momenta = [-1.0 if norm.momentum is None else norm.momentum for norm in norms]
        operator = getattr(ops, f"{name}_step")
        with without_autocast("cpu"):
            y, saved = operator(x, parameters, running, momenta, [norm.eps for norm in norms], *settings)
        ctx.step, ctx.settings, ctx.num_parameters = name, settings, len(parameters)
        ctx.save_for_backward(x, *parameters, *saved)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *tensors = ctx.saved_tensors
        parameters, saved = tensors[: ctx.num_parameters], tensors[ctx.num_parameters :]
        operator = getattr(ops, f"{ctx.step}_step_backward")
        with without_autocast("cpu"):
            dx, *gradients = operator(grad, x, saved, parameters, *ctx.settings)
        return dx, None, None, None, *gradients


class _Conv(NamedTuple):
    """A convolution that the kernels can run; ``side`` is its kernel's in pixels, 0 for any odd one."""

    side: int = 1
    stride: int = 1
    is_depthwise: bool = False
    has_bias: bool = False


# The layers that the kernels run, by group, in the order of `nn.Module.modules` and without the group itself.
_CONV_BN = (ConvBN, _Conv(), BatchNorm2d)
_STEM_CONV_BN = (ConvBN, _Conv(side=3, stride=2), BatchNorm2d)
_STEM = (*_STEM_CONV_BN, *3 * (nn.ReLU, *_STEM_CONV_BN))
_DEPTHWISE = (Residual, ConvBN, _Conv(side=0, is_depthwise=True), BatchNorm2d)
_DEPTHWISE_STRIDE = (ConvBN, _Conv(side=0, stride=2, is_depthwise=True), BatchNorm2d)
_FFN = (Residual, FFN, *_CONV_BN, *_CONV_BN)
_SQUEEZE_EXCITE = (SqueezeExcite, _Conv(has_bias=True), nn.Identity, nn.ReLU, _Conv(has_bias=True), Sigmoid)
_PATCH_MERGING = (*_CONV_BN, *_DEPTHWISE_STRIDE, *_SQUEEZE_EXCITE, *_CONV_BN)
_BANDS = (nn.ModuleList, _Conv(side=0, is_depthwise=True), nn.ModuleList, ChannelScale)
_SS2D = (SS2D, *_CONV_BN, _Conv(side=0, is_depthwise=True, has_bias=True), nn.SiLU, nn.LayerNorm, *_CONV_BN)
_LOCAL = (
    *(MKDeConv, _Conv(side=0, is_depthwise=True), BatchNorm2d),
    *(_Conv(side=1, is_depthwise=True), BatchNorm2d),
)
_MIXER = (
    *(Residual, Mixer, MRFFI, WTEMamba, *_SS2D, ChannelScale, *_BANDS),
    *(*_LOCAL, nn.Sequential, nn.ReLU, *_CONV_BN),
)
_BLOCK = (*_DEPTHWISE, *_FFN, *_MIXER, *_DEPTHWISE, *_FFN, DropPath)


class _Decision:
    """That a group runs as steps, with what this depends on and can change unnoticed by `StepGroup`.

    Args:
        modules: All modules of the group.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self.next_hook = RemovableHandle.next_id  # every hook that is added counts it up
        self.norms = [module for module in modules if isinstance(module, nn.BatchNorm2d)]
        self.children = [(module._modules, tuple(module._modules.values())) for module in modules if module._modules]
        wavelets = [module for module in modules if isinstance(module, WTEMamba)]
        self.filters = [weight for wavelet in wavelets for weight in (wavelet.wt_filter, wavelet.iwt_filter)]
        self.versions = [weight._version for weight in self.filters]

    def holds(self) -> bool:
        """Return whether the group is as it was."""
        return (
            self.next_hook == RemovableHandle.next_id
            and all(norm.training for norm in self.norms)
            and all(tuple(modules.values()) == children for modules, children in self.children)
            and self.versions == [weight._version for weight in self.filters]
            and not any(weight.requires_grad for weight in self.filters)
        )


def _runs_as_steps(group: StepGroup, x: Tensor, kinds: Sequence[type[nn.Module] | _Conv]) -> bool:
    """Return whether a group in training runs as steps on ``x`` (B, C, H, W).

    It does where `serve_training` allows it, every layer is of its kind and in float32, and no hook watches what
    happens inside.
    """
    if not group.training or not cpu_layers.serve_training(x) or torch_modules._has_any_global_hook():
        return False
    if group._decision is None or not group._decision.holds():
        group._decision = _decide(group, kinds)
    return group._decision is not None


def _decide(group: StepGroup, kinds: Sequence[type[nn.Module] | _Conv]) -> _Decision | None:
    modules: list[nn.Module] = []
    _collect(group, modules)
    layers = modules[1:]
    if len(layers) != len(kinds) or not all(map(_is_supported, layers, kinds)):
        return None
    return _Decision(modules)


def _collect(module: nn.Module, modules: list[nn.Module]) -> None:
    """Append a module and all within it as `nn.Module.modules` lists them, but one in two places twice."""
    modules.append(module)
    for child in module._modules.values():
        if child is not None:
            _collect(child, modules)


def _is_supported(module: nn.Module, kind: type[nn.Module] | _Conv) -> bool:
    """Return whether the kernels for a layer of this kind do what a module does, and no hook watches it.

    Types are compared exactly: a subclass may do something else.
    """
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return False
    for parameter in module._parameters.values():
        if parameter is not None and (parameter.dtype != torch.float32 or not parameter.is_cpu):
            return False
    if isinstance(kind, _Conv):
        return type(module) is nn.Conv2d and _is_supported_conv(module, kind)
    if type(module) is not kind:
        return False
    if isinstance(module, nn.BatchNorm2d):
        return module.training and module.affine and module.track_running_stats
    if isinstance(module, WTEMamba):
        filters = (module.wt_filter, module.iwt_filter)
        return all(is_haar(weight) and not weight.requires_grad for weight in filters)
    if isinstance(module, SqueezeExcite):
        return not module.add_maxpool
    return not isinstance(module, SS2D) or len(SCANS[module.scan]) == 1


def _is_supported_conv(conv: nn.Conv2d, kind: _Conv) -> bool:
    side = conv.kernel_size[0]
    if side % 2 == 0 or conv.kernel_size != (side, side) or conv.padding not in ("same", (side // 2, side // 2)):
        return False
    if conv.stride != (kind.stride, kind.stride) or conv.dilation != (1, 1) or conv.padding_mode != "zeros":
        return False
    groups = conv.in_channels if kind.is_depthwise else 1
    if conv.groups != groups or (kind.is_depthwise and conv.out_channels != groups):
        return False
    return kind.side in (0, side) and (conv._parameters["bias"] is not None) == kind.has_bias
