"""A network in the form that runtimes take best: plain convolutions, maps as they are, a scan without a loop.

What `fuse()` folds stays folded, but as `nn.Conv2d`, as runtimes fuse convolutions with what follows and lay out maps
by themselves.

B batch, C channels, H height, W width.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers import Activation
from ..mobilemamba import MobileMamba
from ..mobilemamba import folded_layers as folded
from .scan import scan_directions

__all__ = ["Form", "Portable", "crop_like", "portable"]

_ACTIVATIONS = {Activation.NONE: nn.Identity, Activation.RELU: nn.ReLU, Activation.SILU: nn.SiLU}


@dataclass(frozen=True, kw_only=True, slots=True)
class Form:
    """What a runtime takes best.

    Attributes:
        is_joined: Run the directions of a scan as one map, for which those that run backwards are flipped: half as many
            operators. Otherwise one after the other, without a flip.
    """

    is_joined: bool = True


class Portable(nn.Module):
    """Stem, stages and head in portable form: (B, C, H, W) -> (B, num_classes), as the network it was made of.

    Args:
        stages: The stem and the stages.
        global_pool: As of `MobileMamba`.
        head: From the pooled features to the result.
    """

    def __init__(self, stages: Sequence[nn.Module], global_pool: str, head: nn.Module) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages)
        self.global_pool = global_pool
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)[-1]
        if self.global_pool == "avg":
            x = x.mean((2, 3))
        elif self.global_pool:
            x = x.amax((2, 3))
        return self.head(x)

    def features(self, x: Tensor) -> list[Tensor]:
        """Return the maps after each of the stages, without the stem's."""
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps[1:]


@torch.no_grad()
def portable(network: MobileMamba, form: Form, size: tuple[int, int] | None) -> Portable:
    """Return a network in portable form; the given one stays as it is.

    Args:
        network: Folded or not, in any mode, on a CPU.
        form: What the runtime takes best.
        size: Height and width of the images in pixels; None where these may be any.
    """
    network = copy.deepcopy(network).eval().fuse()
    # With features of the stem, several are of one stage.
    reductions = {info["module"].partition(".")[0]: info["reduction"] for info in network.feature_info}
    stages = []
    for name, reduction in reductions.items():
        sides = None
        if size is not None:  # within a stage, downsampling comes before the scans
            height, width = (math.ceil(side / reduction) for side in size)
            sides = height, width
        stages.append(_Translator(form, sides).translate(getattr(network, name)))
    head = _linear(network.head) if isinstance(network.head, nn.Linear) else nn.Identity()
    return Portable(stages, network.global_pool, head).eval().requires_grad_(False)


class _Translator:
    """Folded layers to portable ones, of a stage with maps of some size; see `DirectionalScan`."""

    def __init__(self, form: Form, sides: tuple[int, int] | None) -> None:
        self.form = form
        self.sides = sides

    def translate(self, module: Any) -> nn.Module:
        kinds: dict[type[nn.Module], Callable[[Any], nn.Module]] = {
            folded.FoldedConvs: _convs,
            folded.FoldedPointwise: _pointwise,
            folded.FoldedDepthwise: _depthwise,
            folded.FoldedFFN: _ffn,
            folded.FoldedSqueezeExcite: _squeeze_excite,
            folded.FoldedMixer: self._mixer,
            folded.FoldedBlock: self._block,
            folded.FoldedPatchMerging: self._sequential,
            nn.Sequential: self._sequential,
            nn.Identity: lambda identity: identity,
        }
        return kinds[type(module)](module)

    def _sequential(self, layers: nn.Sequential) -> nn.Module:
        return nn.Sequential(*map(self.translate, layers))

    def _block(self, block: Any) -> nn.Module:
        return _Block(_ffn(block.ffn0), self._mixer(block.mixer), _ffn(block.ffn1))

    def _mixer(self, mixer: Any) -> nn.Module:
        global_op: nn.Module = nn.Identity()
        if mixer.split[0]:
            wavelet = mixer.global_op
            scan = _SS2D(wavelet.global_atten, self.form, self.sides)
            global_op = _Wavelet(scan, wavelet, self.sides)
        return _Mixer(mixer.split, global_op, self.translate(mixer.local_op), _pointwise(mixer.proj))


def _conv(weight: Tensor, bias: Tensor | None, *, stride: int = 1, padding: int = 0, groups: int = 1) -> nn.Conv2d:
    """Return a convolution with the weights (C', C / groups, k, k)."""
    outputs, inputs, *_ = weight.shape
    side = weight.shape[-1]
    conv = nn.Conv2d(
        inputs * groups, outputs, side, stride, padding, groups=groups, bias=bias is not None, device="meta"
    )
    plain = weight.detach().clone(memory_format=torch.contiguous_format)  # folding may leave it channels-last
    conv.weight = nn.Parameter(plain, requires_grad=False)
    if bias is not None:
        conv.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    return conv


def _linear(linear: nn.Linear) -> nn.Linear:
    plain = nn.Linear(linear.in_features, linear.out_features, device="meta")
    plain.weight, plain.bias = linear.weight, linear.bias
    return plain


def _convs(layers: Any) -> nn.Module:
    _, stride, padding = layers.shape
    convs: list[nn.Module] = []
    for weight, bias in zip(*layers.padded(), strict=True):  # runtimes cut maps into blocks of 8 or 16 channels
        convs += [nn.ReLU()] if convs else []
        convs.append(_conv(weight, bias, stride=stride, padding=padding))
    return nn.Sequential(*convs)


def _pointwise(layer: Any) -> nn.Module:
    return _activated(_conv(layer.weight[..., None, None], layer.bias), layer.activation)


def _depthwise(layer: Any) -> nn.Module:
    conv = _conv(layer.weight, layer.bias, stride=layer.stride, padding=layer.padding, groups=len(layer.weight))
    activated = _activated(conv, layer.activation)
    return activated if layer.scale is None else nn.Sequential(activated, _Affine(layer.scale, layer.shift))


def _activated(conv: nn.Conv2d, activation: Activation) -> nn.Module:
    return conv if activation is Activation.NONE else nn.Sequential(conv, _ACTIVATIONS[activation]())


def _ffn(ffn: Any) -> nn.Module:
    depthwise = nn.Identity() if ffn.depthwise is None else _depthwise(ffn.depthwise)
    return _FFN(depthwise, _pointwise(ffn.widen), _pointwise(ffn.narrow))


def _squeeze_excite(layer: Any) -> nn.Module:
    return _SqueezeExcite(_pointwise(layer.reduce), _pointwise(layer.expand))


class _Affine(nn.Module):
    """Scale and shift every channel."""

    scale: Tensor
    shift: Tensor

    def __init__(self, scale: Tensor, shift: Tensor) -> None:
        super().__init__()
        self.register_buffer("scale", scale.detach().view(1, -1, 1, 1).clone())
        self.register_buffer("shift", shift.detach().view(1, -1, 1, 1).clone())

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.shift


class _FFN(nn.Module):
    """Depthwise convolution, then a feed-forward with its residual."""

    def __init__(self, depthwise: nn.Module, widen: nn.Module, narrow: nn.Module) -> None:
        super().__init__()
        self.depthwise = depthwise
        self.widen = widen
        self.narrow = narrow

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise(x)
        return self.narrow(self.widen(x)) + x


class _SqueezeExcite(nn.Module):
    """Every channel times a gate made of the means of all."""

    def __init__(self, reduce: nn.Module, expand: nn.Module) -> None:
        super().__init__()
        self.reduce = reduce
        self.expand = expand

    def forward(self, x: Tensor) -> Tensor:
        gate = self.expand(self.reduce(x.mean((2, 3), keepdim=True)))
        return x * gate.sigmoid()


class _SS2D(nn.Module):
    """Gated selective scan: (B, C, H, W) -> (B, C, H, W)."""

    skip: Tensor

    def __init__(self, scan: Any, form: Form, sides: tuple[int, int] | None) -> None:
        super().__init__()
        weights, biases = scan.in_proj.weight.chunk(2), scan.in_proj.bias.chunk(2)
        self.in_x, self.in_z = (
            _conv(weight[..., None, None], bias) for weight, bias in zip(weights, biases, strict=True)
        )
        self.conv = _depthwise(scan.conv2d)
        self.scans = nn.ModuleList(scan_directions(scan, sides, is_joined=form.is_joined))
        skip = scan.Ds.view(len(scan.dt_projs_weight), -1).sum(0)
        self.register_buffer("skip", skip)
        self.norm = nn.LayerNorm(len(skip), eps=scan.out_norm.eps)
        self.norm.weight, self.norm.bias = scan.out_norm.weight, scan.out_norm.bias
        self.out_proj = _pointwise(scan.out_proj)

    def forward(self, x: Tensor) -> Tensor:
        gate = F.silu(self.in_z(x)).permute(0, 2, 3, 1)
        x = self.conv(self.in_x(x)).permute(0, 2, 3, 1)
        y = x * self.skip
        for scan in self.scans:
            y = y + scan(x)
        y = self.norm(y) * gate
        return self.out_proj(y.permute(0, 3, 1, 2))


@torch.fx.wrap
def crop_like(x: Tensor, like: Tensor) -> Tensor:
    """Return what of ``x`` (B, C, H', W') lies within the height and width of ``like`` (B, C, H, W)."""
    return x[:, :, : like.shape[2], : like.shape[3]]


class _Wavelet(nn.Module):
    """Scan plus the convolution of the four bands of the wavelet transform: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, scan: nn.Module, wavelet: Any, sides: tuple[int, int] | None) -> None:
        super().__init__()
        self.scan = scan
        self.has_odd_sides = sides is None or any(side % 2 for side in sides)
        filters, weight = wavelet.wt_filter, wavelet.bands.weight
        channels = len(filters) // 4
        # 3 x 3 with zeros above and to the left, so that zeros on every side take the place of those at odd sides.
        self.to_bands = _conv(F.pad(filters, (1, 0, 1, 0)), None, stride=2, padding=1, groups=channels)
        self.bands = _conv(weight, None, padding=weight.shape[-1] // 2, groups=len(weight))
        self.to_pixels = nn.ConvTranspose2d(4 * channels, channels, 2, 2, groups=channels, bias=False, device="meta")
        self.to_pixels.weight = nn.Parameter(wavelet.iwt_filter.detach().clone(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.scan(x)
        pixels = self.to_pixels(self.bands(self.to_bands(x)))
        return y + (crop_like(pixels, x) if self.has_odd_sides else pixels)


class _Mixer(nn.Module):
    """The three branches, their projection and the residual around them."""

    def __init__(self, split: tuple[int, int, int], global_op: nn.Module, local_op: nn.Module, proj: nn.Module) -> None:
        super().__init__()
        self.split = [channels for channels in split if channels]
        branches = (global_op, local_op, nn.Identity())
        self.branches = nn.ModuleList(branch for branch, channels in zip(branches, split, strict=True) if channels)
        self.proj = proj

    def forward(self, x: Tensor) -> Tensor:
        parts = x.split(self.split, dim=1)
        y = torch.cat([branch(parts[index]) for index, branch in enumerate(self.branches)], dim=1)
        return self.proj(F.relu(y)) + x


class _Block(nn.Module):
    """Feed-forward, mixer, feed-forward, each with its residual, and the residual around them."""

    def __init__(self, ffn0: nn.Module, mixer: nn.Module, ffn1: nn.Module) -> None:
        super().__init__()
        self.ffn0 = ffn0
        self.mixer = mixer
        self.ffn1 = ffn1

    def forward(self, x: Tensor) -> Tensor:
        y = self.ffn0(x)
        y = self.mixer(y)
        return self.ffn1(y) + x
