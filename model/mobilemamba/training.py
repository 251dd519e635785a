"""Layers in training on a CPU: whole groups of them as one step of autograd, on the compiled kernels.

PyTorch keeps both what a batch norm reads and what it gives. Here a group keeps what its batch norms read, and the
backward pass normalises again: less to keep, and less to fetch. Where the kernels do not serve (`runs_as_step` says
when), the same layers run one by one.

B batch, C channels, D inner channels of the scan, H height, W width; rows are the B * H * W pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import Sigmoid, SqueezeExcite
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules import module as torch_modules

from ..layers import FFN, Activation, ConvBN, Residual
from ..lib_mamba import SCANS, SS2D
from ..lib_mamba.layer_kernels import depthwise_taps, serve_training
from .mixer import MRFFI, Mixer, MKDeConv
from .wavelet import ChannelScale, WTEMamba, band_taps, band_weights, is_haar

__all__ = ["depthwise_ffn", "expand_and_stride", "mix", "pointwise", "runs_as_step", "squeeze_excite", "stem"]

ops = torch.ops.mobilemamba_kernels
_NORM, _RELU, _SILU = Activation.NONE, Activation.RELU, Activation.SILU


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
        modules = list(_walk(layer))
        if not layer.training or len(modules) != len(kinds) or not all(map(_is_trainable, modules, kinds)):
            return False
    return True


def _walk(module: nn.Module) -> Iterator[nn.Module]:
    """Like `nn.Module.modules`, in a fraction of its time; a module in two places comes twice."""
    yield module
    for child in module._modules.values():
        if child is not None:
            yield from _walk(child)


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


class _Norm(NamedTuple):
    """A batch norm on one batch: its statistics and parameters, (C,) each."""

    mean: Tensor
    var: Tensor
    weight: Tensor
    bias: Tensor
    eps: float

    @classmethod
    def of(cls, x: Tensor, layer: Any, weight: Tensor, bias: Tensor) -> _Norm:
        """Measure a map (B, C, H, W), and let the layer's running statistics see it."""
        if x.numel() == x.shape[1]:  # as PyTorch has it
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {x.shape}")
        layer.num_batches_tracked.add_(1)
        momentum = 1 / int(layer.num_batches_tracked) if layer.momentum is None else layer.momentum
        mean, var = ops.moments(x, layer.running_mean, layer.running_var, momentum)
        return cls(mean, var, weight, bias, layer.eps)

    def __call__(self, x: Tensor, activation: Activation = _NORM, residual: Tensor | None = None) -> Tensor:
        """Return act(norm(x)) + residual."""
        return ops.normalize(x, *self, int(activation), residual)

    def halves(self) -> tuple[_Norm, _Norm]:
        """Return the norms of the first and of the last half of the channels."""
        first, last = zip(*(tensor.chunk(2) for tensor in self[:-1]), strict=True)
        return _Norm._make([*first, self.eps]), _Norm._make([*last, self.eps])

    def backward(
        self, grad: Tensor, x: Tensor, activation: Activation = _NORM, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of x (in ``out``, which may be ``grad``), weight and bias."""
        out = torch.empty_like(x) if out is None else out
        return out, *ops.normalize_backward(grad, x, *self, int(activation), out)


def _rows(x: Tensor) -> Tensor:
    """Return a map (B, C, H, W) as rows (B * H * W, C): a view where channels lie side by side."""
    return x.permute(0, 2, 3, 1).flatten(0, 2)


def _map(rows: Tensor, like: Tensor) -> Tensor:
    """Return rows (B * H * W, C) as a map with the sides of another."""
    return rows.view(like.shape[0], *like.shape[2:], -1).permute(0, 3, 1, 2)


def _join(*maps: Tensor) -> Tensor:
    """Put the channels of maps side by side. As rows: PyTorch's layout depends on the first map, even an empty one."""
    return _map(torch.cat([_rows(x) for x in maps], dim=1), maps[0])


def _convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, stride: int = 1, activation: Activation = _NORM
) -> Tensor:
    """Convolve depthwise with a weight (C, 1, H, W)."""
    bias = x.new_zeros(x.shape[1]) if bias is None else bias
    padding = weight.shape[2] // 2
    return ops.depthwise(x, depthwise_taps(weight), bias, None, None, stride, padding, int(activation))


def _parameters(*layers: Any) -> list[Tensor]:
    return [parameter for layer in layers for parameter in (layer.c.weight, layer.bn.weight, layer.bn.bias)]


class _Step(torch.autograd.Function):
    """What the steps have in common: they save their batch norms and other tensors."""

    @staticmethod
    def save(ctx: Any, norms: Sequence[_Norm], *others: Tensor) -> None:
        """Keep what the backward pass needs."""
        ctx.eps = [norm.eps for norm in norms]
        ctx.save_for_backward(*(tensor for norm in norms for tensor in norm[:-1]), *others)

    @staticmethod
    def saved(ctx: Any) -> tuple[list[_Norm], tuple[Tensor, ...]]:
        """Return the norms and the other tensors."""
        tensors = ctx.saved_tensors
        size = len(_Norm._fields) - 1
        norms = [_Norm._make([*tensors[index * size : (index + 1) * size], eps]) for index, eps in enumerate(ctx.eps)]
        return norms, tensors[len(norms) * size :]


class _DepthwiseFFN(_Step):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layers: Sequence[nn.BatchNorm2d], *parameters: Tensor) -> Tensor:
        taps, weight0, bias0, wide, weight1, bias1, narrow, weight2, bias2 = parameters
        u0 = _convolve(x, taps)
        norm0 = _Norm.of(u0, layers[0], weight0, bias0)
        y = norm0(u0, residual=x)
        u1 = ops.product(y, wide)
        norm1 = _Norm.of(u1, layers[1], weight1, bias1)
        u2 = ops.product(norm1(u1, _RELU), narrow)
        norm2 = _Norm.of(u2, layers[2], weight2, bias2)
        _Step.save(ctx, (norm0, norm1, norm2), x, u0, u1, u2, taps, wide, narrow)
        return norm2(u2, residual=y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (norm0, norm1, norm2), (x, u0, u1, u2, taps, wide, narrow) = _Step.saved(ctx)
        du, dweight2, dbias2 = norm2.backward(grad, u2)
        dh, dnarrow = ops.product_backward(du, norm1(u1, _RELU), narrow, None)
        dh, dweight1, dbias1 = norm1.backward(dh, u1, _RELU, out=dh)
        dy, dwide = ops.product_backward(dh, norm0(u0, residual=x), wide, grad)
        du, dweight0, dbias0 = norm0.backward(dy, u0, out=du)
        dx, dtaps = ops.depthwise_backward(du, x, taps, 1, dy)
        return dx, None, dtaps, dweight0, dbias0, dwide, dweight1, dbias1, dnarrow, dweight2, dbias2


def depthwise_ffn(depthwise: Any, ffn: Any, x: Tensor) -> Tensor:
    """Run a residual depthwise convolution and the residual feed-forward after it: (B, C, H, W) -> (B, C, H, W)."""
    if not runs_as_step(x, (depthwise, _DEPTHWISE), (ffn, _FFN)):
        return ffn(depthwise(x))
    layers = (depthwise.m, ffn.m.pw1, ffn.m.pw2)
    return _DepthwiseFFN.apply(x, [layer.bn for layer in layers], *_parameters(*layers))


class _Pointwise(_Step):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: nn.BatchNorm2d, weight: Tensor, *affine: Tensor) -> Tensor:
        u = ops.product(x, weight)
        norm = _Norm.of(u, layer, *affine)
        _Step.save(ctx, [norm], x, u, weight)
        return norm(u)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (norm,), (x, u, weight) = _Step.saved(ctx)
        du, *daffine = norm.backward(grad, u)
        dx, dweight = ops.product_backward(du, x, weight, None)
        return dx, None, dweight, *daffine


def pointwise(layer: Any, x: Tensor) -> Tensor:
    """Run a 1 x 1 convolution and its batch norm: (B, C, H, W) -> (B, C', H, W)."""
    if not runs_as_step(x, (layer, _CONV_BN)):
        return layer(x)
    return _Pointwise.apply(x, layer.bn, *_parameters(layer))


def squeeze_excite(layer: Any, x: Tensor) -> Tensor:
    """Run timm's squeeze-excite: (B, C, H, W) -> (B, C, H, W). On one pixel an image, a product beats a convolution."""
    if not runs_as_step(x, (layer, _SQUEEZE_EXCITE)) or layer.add_maxpool:
        return layer(x)
    reduce, expand = layer.fc1, layer.fc2
    gate = F.relu(F.linear(x.mean((2, 3)), reduce.weight.flatten(1), reduce.bias))
    gate = F.linear(gate, expand.weight.flatten(1), expand.bias).sigmoid()
    return x * gate.view(*gate.shape, 1, 1)


class _ExpandAndStride(_Step):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layers: Sequence[nn.BatchNorm2d], *parameters: Tensor) -> Tensor:
        wide, weight1, bias1, taps, weight2, bias2 = parameters
        u1 = ops.product(x, wide)
        norm1 = _Norm.of(u1, layers[0], weight1, bias1)
        u2 = _convolve(norm1(u1, _RELU), taps, stride=2)
        norm2 = _Norm.of(u2, layers[1], weight2, bias2)
        _Step.save(ctx, (norm1, norm2), x, u1, u2, wide, taps)
        return norm2(u2, _RELU)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (norm1, norm2), (x, u1, u2, wide, taps) = _Step.saved(ctx)
        du, dweight2, dbias2 = norm2.backward(grad, u2, _RELU)
        dh, dtaps = ops.depthwise_backward(du, norm1(u1, _RELU), taps, 2, None)
        dh, dweight1, dbias1 = norm1.backward(dh, u1, _RELU, out=dh)
        dx, dwide = ops.product_backward(dh, x, wide, None)
        return dx, None, dwide, dweight1, dbias1, dtaps, dweight2, dbias2


def expand_and_stride(expand: Any, stride: Any, x: Tensor) -> Tensor:
    """Run a 1 x 1 and a depthwise convolution of stride 2, each with a ReLU: (B, C, H, W) -> (B, C', H/2, W/2)."""
    if not runs_as_step(x, (expand, _CONV_BN), (stride, _DEPTHWISE_STRIDE)):
        x = F.relu(expand(x), inplace=True)
        return F.relu(stride(x), inplace=True)
    layers = (expand, stride)
    return _ExpandAndStride.apply(x, [layer.bn for layer in layers], *_parameters(*layers))


class _Stem(_Step):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layers: Sequence[nn.BatchNorm2d], *parameters: Tensor) -> Tensor:
        weights, scales, shifts = parameters[::3], parameters[1::3], parameters[2::3]
        maps: list[Tensor] = []
        norms: list[_Norm] = []
        for weight, layer, scale, shift in zip(weights, layers, scales, shifts, strict=True):
            if norms:
                maps.append(ops.strided_conv(maps[-1], *norms[-1], weight))
            else:
                maps.append(F.conv2d(x, weight, stride=2, padding=1))
            norms.append(_Norm.of(maps[-1], layer, scale, shift))
        _Step.save(ctx, norms, x, *maps, *weights)
        return norms[-1](maps[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        norms, (x, *tensors) = _Step.saved(ctx)
        maps, weights = tensors[: len(norms)], tensors[len(norms) :]
        grad, *daffine = norms[-1].backward(grad, maps[-1])
        dparameters = daffine
        for norm, u, weight in reversed(list(zip(norms[:-1], maps[:-1], weights[1:], strict=True))):
            grad, dweight = ops.strided_conv_backward(grad, u, *norm, weight)
            grad, *daffine = norm.backward(grad, u, _RELU, out=grad)
            dparameters = [*daffine, dweight, *dparameters]
        needs = [ctx.needs_input_grad[0], True, False]
        dx, dweight, _ = torch.ops.aten.convolution_backward(
            grad, x, weights[0], None, [2, 2], [1, 1], [1, 1], False, [0, 0], 1, needs
        )
        return dx, None, dweight, *dparameters


def stem(layers: nn.Sequential, x: Tensor) -> Tensor:
    """Run 3 x 3 convolutions of stride 2 with a ReLU between them: (B, C, H, W) -> (B, C', H/16, W/16)."""
    convs, activations = list(layers)[::2], list(layers)[1::2]
    kinds = [(conv, _STEM_CONV_BN) for conv in convs] + [(activation, (nn.ReLU,)) for activation in activations]
    if runs_as_step(x, *kinds):
        return _Stem.apply(x, [conv.bn for conv in convs], *_parameters(*convs))
    for layer in layers:
        x = layer(x)
    return x


class _MixerParameters(NamedTuple):
    """What a mixer learns, in the order of the layers; or the gradients of it."""

    in_weight: Tensor
    in_scale: Tensor
    in_shift: Tensor
    conv_weight: Tensor
    conv_bias: Tensor
    x_weight: Tensor
    dt_weight: Tensor
    dt_bias: Tensor
    A_log: Tensor
    D_skip: Tensor
    norm_weight: Tensor
    norm_bias: Tensor
    out_weight: Tensor
    out_scale: Tensor
    out_shift: Tensor
    base_scale: Tensor
    band_weight: Tensor
    band_scale: Tensor
    local_weight: Tensor
    local_scale: Tensor
    local_shift: Tensor
    factor: Tensor
    factor_scale: Tensor
    factor_shift: Tensor
    proj_weight: Tensor
    proj_scale: Tensor
    proj_shift: Tensor

    @classmethod
    def of(cls, mixer: Any) -> _MixerParameters:
        wavelet, local = mixer.global_op, mixer.local_op
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
            *_parameters(mixer.proj[1]),
        ]
        return cls._make(parameters)

    @property
    def scan(self) -> tuple[Tensor, ...]:
        """The parameters of the gated scan."""
        first = self._fields.index("dt_weight")
        return self[first : first + 6]

    @property
    def bands(self) -> Tensor:
        """The weight of the bands, their scale in it, as kernels read it."""
        return band_taps(self.band_weight * self.band_scale.view(-1, 1, 1, 1))


class _MixerSettings(NamedTuple):
    """What a mixer is made of beside its parameters."""

    split: tuple[int, int, int]
    layers: list[nn.BatchNorm2d]  # in their order
    norm_eps: float
    reverse: list[int]


class _Mixer(_Step):
    @staticmethod
    def forward(ctx: Any, x: Tensor, settings: _MixerSettings, *parameters: Tensor) -> Tensor:
        p = _MixerParameters(*parameters)
        x_global, x_local, x_identity = x.split(settings.split, dim=1)
        u_in = ops.product(x_global, p.in_weight)
        in_norm = _Norm.of(u_in, settings.layers[0], p.in_scale, p.in_shift)
        x_scan, z = in_norm(u_in).chunk(2, dim=1)
        x_scan = _convolve(x_scan, p.conv_weight, p.conv_bias, activation=_SILU)
        projection = _rows(x_scan) @ p.x_weight.flatten(0, 1).t()
        y_scan = _Mixer.gated_scan(x_scan, z, projection, p, settings)
        u_out = ops.product(y_scan, p.out_weight)
        base = p.base_scale.flatten()
        out_norm = _Norm.of(u_out, settings.layers[1], p.out_scale * base, p.out_shift * base)
        y_global = ops.wavelet(x_global, p.bands, out_norm(u_out))
        u_local = _convolve(x_local, p.local_weight)
        local_norm = _Norm.of(u_local, settings.layers[2], p.local_scale, p.local_shift)
        h_local = local_norm(u_local, _RELU) * p.factor.view(1, -1, 1, 1)
        factor_norm = _Norm.of(h_local, settings.layers[3], p.factor_scale, p.factor_shift)
        y = _join(y_global, factor_norm(h_local), x_identity).relu_()
        u_proj = ops.product(y, p.proj_weight)
        proj_norm = _Norm.of(u_proj, settings.layers[4], p.proj_scale, p.proj_shift)
        ctx.settings = settings
        norms = (in_norm, out_norm, local_norm, factor_norm, proj_norm)
        saved = (x, u_in, projection, y_scan, u_out, u_local, y, u_proj)
        _Step.save(ctx, norms, *saved, *parameters)
        return proj_norm(u_proj, residual=x)

    @staticmethod
    def gated_scan(x: Tensor, z: Tensor, projection: Tensor, p: _MixerParameters, settings: _MixerSettings) -> Tensor:
        """Scan maps x and z (B, D, H, W): (B, D, H, W)."""
        sequences = (_sequence(x), _sequence(z), projection.view(len(x), -1, projection.shape[1]))
        y = ops.gated_scan(*sequences, *p.scan, settings.norm_eps, settings.reverse)
        return _map(y, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        norms, (x, u_in, projection, y_scan, u_out, u_local, y, u_proj, *parameters) = _Step.saved(ctx)
        in_norm, out_norm, local_norm, factor_norm, proj_norm = norms
        settings, p = ctx.settings, _MixerParameters(*parameters)
        x_global, x_local, _ = x.split(settings.split, dim=1)

        du, dproj_scale, dproj_shift = proj_norm.backward(grad, u_proj)
        dy, dproj_weight = ops.product_backward(du, y, p.proj_weight, None)
        dy = torch.ops.aten.threshold_backward(dy, y, 0)
        dy_global, dy_local, dx_identity = dy.split(settings.split, dim=1)

        factor = p.factor.view(1, -1, 1, 1)
        h_local = local_norm(u_local, _RELU)
        dh, dfactor_scale, dfactor_shift = factor_norm.backward(dy_local, h_local * factor)
        dfactor = (dh * h_local).sum((0, 2, 3)).view_as(p.factor)
        du, dlocal_scale, dlocal_shift = local_norm.backward(dh * factor, u_local, _RELU)
        dx_local, dlocal_weight = ops.depthwise_backward(du, x_local, p.local_weight, 1, None)

        # The norm's weight and bias hold base_scale.
        du, dscale, dshift = out_norm.backward(dy_global, u_out)
        base = p.base_scale.flatten()
        dbase_scale = (dscale * p.out_scale + dshift * p.out_shift).view_as(p.base_scale)
        dy_scan, dout_weight = ops.product_backward(du, y_scan, p.out_weight, None)

        x_in, z = in_norm(u_in).chunk(2, dim=1)
        x_conv = _convolve(x_in, p.conv_weight, p.conv_bias)
        x_scan = F.silu(x_conv)
        sequences = (_sequence(x_scan), _sequence(z), projection.view(len(x), -1, projection.shape[1]))
        dx_scan, dz, dprojection, *dscan = ops.gated_scan_backward(
            _sequence(dy_scan), *sequences, *p.scan, settings.norm_eps, settings.reverse
        )
        dprojection = dprojection.flatten(0, 1)
        dx_weight = (dprojection.t() @ _rows(x_scan)).view_as(p.x_weight)
        dx_scan = dx_scan.flatten(0, 1).addmm_(dprojection, p.x_weight.flatten(0, 1))
        dx_conv = torch.ops.aten.silu_backward(_map(dx_scan, x), x_conv)
        dconv_bias = _rows(dx_conv).sum(0)
        dx_in, dconv_weight = ops.depthwise_backward(dx_conv, x_in, p.conv_weight, 1, None)
        du = torch.empty_like(u_in)
        sides = zip((dx_in, _map(dz, x)), in_norm.halves(), u_in.chunk(2, 1), du.chunk(2, 1), strict=True)
        affine = [norm.backward(half, u_half, out=du_half)[1:] for half, norm, u_half, du_half in sides]
        din_scale, din_shift = map(torch.cat, zip(*affine, strict=True))
        dx_global, din_weight = ops.product_backward(du, x_global, p.in_weight, None)

        side = p.band_weight.shape[2]
        dx_global = ops.wavelet(dy_global, p.bands.flip(0, 1).contiguous(), dx_global)
        dbands = band_weights(ops.wavelet_taps(dy_global, x_global, side))
        dband_scale = (dbands * p.band_weight).sum((1, 2, 3)).view_as(p.band_scale)
        dband_weight = dbands * p.band_scale.view(-1, 1, 1, 1)

        dx = _join(dx_global, dx_local, dx_identity).add_(grad)
        gradients = [
            din_weight,
            din_scale,
            din_shift,
            dconv_weight,
            dconv_bias,
            dx_weight,
            *dscan,
            dout_weight,
            dscale * base,
            dshift * base,
            dbase_scale,
            dband_weight,
            dband_scale,
            dlocal_weight,
            dlocal_scale,
            dlocal_shift,
            dfactor,
            dfactor_scale,
            dfactor_shift,
            dproj_weight,
            dproj_scale,
            dproj_shift,
        ]
        return dx, None, *_MixerParameters._make(gradients)


def _sequence(x: Tensor) -> Tensor:
    """Return a map (B, D, H, W) as a sequence (B, H * W, D): a view where channels lie side by side."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def mix(mixer: Any, x: Tensor) -> Tensor:
    """Run a residual mixer: (B, C, H, W) -> (B, C, H, W)."""
    if not runs_as_step(x, (mixer, _MIXER)):
        return mixer(x)
    attn = mixer.m.attn
    ss2d, local = attn.global_op.global_atten, attn.local_op
    layers = [ss2d.in_proj.bn, ss2d.out_proj.bn, local.bn1, local.bn2, attn.proj[1].bn]
    ((_, directions),) = SCANS[ss2d.scan]
    reverse = [int(is_reverse) for is_reverse in directions.values()]
    settings = _MixerSettings(attn.split, layers, ss2d.out_norm.eps, reverse)
    return _Mixer.apply(x, settings, *_MixerParameters.of(attn))
