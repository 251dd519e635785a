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

NUM_BANDS = 4  # of the wavelet transform
_ACTIVATIONS = {Activation.NONE: nn.Identity, Activation.RELU: nn.ReLU, Activation.SILU: nn.SiLU}


@dataclass(frozen=True, kw_only=True, slots=True)
class Form:
    """What a runtime takes best.

    Attributes:
        is_joined: Run the directions of a scan as one map, for which those that run backwards are flipped: half as many
            operators. Otherwise one after the other, without a flip.
        is_flat: Where maps have one size, scan them as sequences of pixels: a runtime that lays out maps as it likes
            then does not do so within a scan.
        is_grouped: Transform to wavelet bands and back by convolutions of groups of channels. Otherwise, where maps
            have one size, by depthwise ones of repeated channels, and by a product: for runtimes that are slow at
            groups.
    """

    is_joined: bool = True
    is_flat: bool = False
    is_grouped: bool = True


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
        num_global, num_local, num_identity = mixer.split
        split: list[int] = []
        branches: list[nn.Module] = []
        if num_global:
            wavelet = mixer.global_op
            scan = _SS2D(wavelet.global_atten, self.form, self.sides)
            split.append(num_global)
            is_grouped = self.form.is_grouped or not wavelet.has_haar_filters
            branches.append(_Wavelet(scan, wavelet, self.sides, is_grouped=is_grouped))
        if num_local:
            split.append(num_local + num_identity)
            branches.append(_local(mixer.local_op, num_identity))
        elif num_identity:
            split.append(num_identity)
            branches.append(nn.ReLU())
        return _Mixer(split, branches, mixer.proj)


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
    return _activated(conv, layer.activation)


def _local(layer: Any, num_identity: int) -> nn.Module:
    """Return the local branch and the ReLU behind it, for some more channels too, of which it is the ReLU alone.

    Runtimes cut maps into blocks of 8 or 16 channels, and the local branch by itself seldom fills these.
    """
    weight = layer.weight
    identity = torch.zeros_like(weight[:1]).expand(num_identity, -1, -1, -1).clone()
    identity[..., layer.padding, layer.padding] = 1
    weight = torch.cat([weight, identity])
    bias, shift = (F.pad(x, (0, num_identity)) for x in (layer.bias, layer.shift))
    scale = F.pad(layer.scale, (0, num_identity), value=1)
    convs = [
        _conv(weight, bias, padding=layer.padding, groups=len(weight)),
        _conv(scale.view(-1, 1, 1, 1), shift, groups=len(scale)),
    ]
    return nn.Sequential(*[each for conv in convs for each in (conv, nn.ReLU())])


def _activated(conv: nn.Conv2d, activation: Activation) -> nn.Module:
    return conv if activation is Activation.NONE else nn.Sequential(conv, _ACTIVATIONS[activation]())


def _ffn(ffn: Any) -> nn.Module:
    depthwise = nn.Identity() if ffn.depthwise is None else _depthwise(ffn.depthwise)
    return _FFN(depthwise, _pointwise(ffn.widen), _pointwise(ffn.narrow))


def _squeeze_excite(layer: Any) -> nn.Module:
    return _SqueezeExcite(_pointwise(layer.reduce), _pointwise(layer.expand))


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
        self.sides = sides if form.is_flat else None
        self.scans = nn.ModuleList(
            scan_directions(scan, sides, is_joined=form.is_joined, is_flat=self.sides is not None)
        )
        skip = scan.Ds.view(len(scan.dt_projs_weight), -1).sum(0)
        self.register_buffer("skip", skip)
        self.norm = nn.LayerNorm(len(skip), eps=scan.out_norm.eps)
        self.norm.weight, self.norm.bias = scan.out_norm.weight, scan.out_norm.bias
        self.out_proj = _pointwise(scan.out_proj)

    def forward(self, x: Tensor) -> Tensor:
        gate = self._channels_last(F.silu(self.in_z(x)))
        x = self._channels_last(self.conv(self.in_x(x)))
        y = x * self.skip
        for scan in self.scans:
            y = y + scan(x)
        y = self.norm(y) * gate
        if self.sides is not None:
            y = y.reshape(-1, *self.sides, len(self.skip))
        return self.out_proj(y.permute(0, 3, 1, 2))

    def _channels_last(self, x: Tensor) -> Tensor:
        """Return a map (B, D, H, W) as (B, H, W, D), or (B, H * W, D)."""
        x = x.permute(0, 2, 3, 1)
        return x if self.sides is None else x.reshape(-1, math.prod(self.sides), len(self.skip))


@torch.fx.wrap
def crop_like(x: Tensor, like: Tensor) -> Tensor:
    """Return what of ``x`` (B, C, H', W') lies within the height and width of ``like`` (B, C, H, W)."""
    return x[:, :, : like.shape[2], : like.shape[3]]


class _Wavelet(nn.Module):
    """Scan plus the convolution of the four wavelet bands, and a ReLU: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, scan: nn.Module, wavelet: Any, sides: tuple[int, int] | None, *, is_grouped: bool) -> None:
        super().__init__()
        self.scan = scan
        self.has_odd_sides = sides is None or any(side % 2 for side in sides)
        filters, weight = wavelet.wt_filter, wavelet.bands.weight
        channels = len(filters) // NUM_BANDS
        if is_grouped or sides is None:
            self.to_bands: nn.Module = _to_bands(filters, channels)
            self.to_pixels: nn.Module = _to_pixels(wavelet.iwt_filter, channels)
        else:
            filters, weight = _by_band(filters), _by_band(weight)
            self.to_bands = nn.Sequential(_Repeat(), _to_bands(filters, len(filters)))
            self.to_pixels = _PixelsOfBands(wavelet.iwt_filter, sides)
        self.bands = _conv(weight, None, padding=weight.shape[-1] // 2, groups=len(weight))

    def forward(self, x: Tensor) -> Tensor:
        y = self.scan(x)
        pixels = self.to_pixels(self.bands(self.to_bands(x)))
        return F.relu(y + (crop_like(pixels, x) if self.has_odd_sides else pixels))


def _to_bands(filters: Tensor, groups: int) -> nn.Conv2d:
    # 3 x 3 with zeros above and to the left, so that zeros on every side take the place of those at odd sides.
    return _conv(F.pad(filters, (1, 0, 1, 0)), None, stride=2, padding=1, groups=groups)


def _to_pixels(filters: Tensor, channels: int) -> nn.Module:
    conv = nn.ConvTranspose2d(len(filters), channels, 2, 2, groups=channels, bias=False, device="meta")
    conv.weight = nn.Parameter(filters.detach().clone(), requires_grad=False)
    return conv


def _by_band(filters: Tensor) -> Tensor:
    """Return filters (4C, 1, k, k), the four bands of each channel, as all channels of each band."""
    return filters.unflatten(0, (-1, NUM_BANDS)).transpose(0, 1).flatten(0, 1)


class _Repeat(nn.Module):
    """All channels once for each band: (B, C, H, W) -> (B, 4C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x] * NUM_BANDS, dim=1)


class _PixelsOfBands(nn.Module):
    """Inverse wavelet transform as a product, of all channels of each band: (B, 4C, h, w) -> (B, C, 2h, 2w)."""

    def __init__(self, filters: Tensor, sides: tuple[int, int]) -> None:
        super().__init__()
        self.sides = [math.ceil(side / 2) for side in sides]
        self.channels = len(filters) // NUM_BANDS
        self.mix = nn.Parameter(filters[:NUM_BANDS, 0].flatten(1).t().contiguous(), requires_grad=False)

    def forward(self, bands: Tensor) -> Tensor:
        height, width = self.sides
        y = bands.permute(0, 2, 3, 1).reshape(-1, height * width, NUM_BANDS, self.channels)
        y = torch.matmul(self.mix, y)  # four pixels in place of four bands
        y = y.reshape(-1, width, 2, 2 * self.channels).permute(0, 2, 1, 3)  # two rows of pairs, from pairs of two rows
        y = y.reshape(-1, 2 * height, 2 * width, self.channels)
        return y.permute(0, 3, 1, 2)


class _Mixer(nn.Module):
    """The branches, each up to the ReLU that follows, their projection and the residual around them.

    Every branch is projected by itself and added, so that no map is put together of them.

    Args:
        split: The channels of each branch.
        branches: As many layers.
        proj: The projection of all of them.
    """

    def __init__(self, split: Sequence[int], branches: Sequence[nn.Module], proj: Any) -> None:
        super().__init__()
        self.split = list(split)
        self.branches = nn.ModuleList(branches)
        weights = proj.weight[..., None, None].split(self.split, dim=1)
        self.projs = nn.ModuleList(_conv(weight, None if index else proj.bias) for index, weight in enumerate(weights))

    def forward(self, x: Tensor) -> Tensor:
        parts = x.split(self.split, dim=1)
        for index, (branch, proj) in enumerate(zip(self.branches, self.projs, strict=True)):
            x = proj(branch(parts[index])) + x
        return x


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
