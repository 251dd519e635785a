"""Layers of a folded network: convolutions with the bias, activation and residual that belong to them.

Each runs on the compiled kernels where these serve (`cpu_layers`), and on PyTorch everywhere else.
B batch, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as torch_modules

from ..layers import Activation, is_on_gpu
from ..lib_mamba import SS2D, cpu_layers, layouts
from ..lib_mamba.backends import without_autocast
from ..lib_mamba.tracing import is_exporting
from .mixer import join_channels
from .wavelet import haar_bands, haar_pixels, haar_signs, is_haar, pixels_of_sums, sums_of_pixels

__all__ = [
    "FoldedBlock",
    "FoldedConvs",
    "FoldedDepthwise",
    "FoldedFFN",
    "FoldedLinear",
    "FoldedMixer",
    "FoldedPatchMerging",
    "FoldedPointwise",
    "FoldedSS2D",
    "FoldedSqueezeExcite",
    "FoldedWTEMamba",
    "average",
    "is_folded",
    "type_under_autocast",
]


_ALIGNMENT = 8  # channels: tensor cores read 16 bytes


def is_folded(network: nn.Module) -> bool:
    """Return whether a MobileMamba is folded."""
    return isinstance(network.patch_embed, FoldedConvs)


def average(x: Tensor) -> Tensor:
    """Return the means over the pixels: (B, C, H, W) -> (B, C)."""
    if (kernels := cpu_layers.serve(x)) is not None:
        return kernels.means(x).flatten(1)
    return x.mean((2, 3))


def _frozen(tensor: Tensor | None) -> nn.Parameter:
    assert tensor is not None
    return nn.Parameter(tensor.detach(), requires_grad=False)


class Packed(nn.Module):
    """A layer that keeps copies of its weights as they are read: in the kernels' layout, in autocast's type.

    The copies follow the weights wherever these go, and are neither in the state dict nor exported.
    """

    def __init__(self) -> None:
        nn.Module.__init__(self)  # not that of a layer whose folded form this is
        self.register_load_state_dict_post_hook(_pack_again)

    def pack(self) -> None:
        """Lay the weights out for the device and processor that they are on, where a kernel reads them otherwise."""

    def read(self, name: str, x: Tensor) -> Tensor:
        """Return a weight in the type in which ``x`` is computed: under autocast a copy that is made once."""
        weight = getattr(self, name)
        dtype = type_under_autocast(x)
        if dtype is None or weight.dtype != torch.float32:
            return weight
        copy_name = f"{name}{_CAST}{_NAMES[dtype]}"
        copy = getattr(self, copy_name, None)
        if copy is not None:
            return copy
        if torch.compiler.is_compiling() or _is_capturing(x):
            return weight.to(dtype)
        with torch.inference_mode(mode=False), torch.no_grad():  # autograd may read it later
            self.register_buffer(copy_name, weight.to(dtype), persistent=False)
        return getattr(self, copy_name)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Packed:
        super()._apply(fn, recurse)
        _pack_again(self)
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.pack()  # pickled, perhaps, where another processor reads other layouts


_CAST = "_in_"
_NAMES = {torch.float16: "float16", torch.bfloat16: "bfloat16"}


def _pack_again(layer: Packed, _incompatible_keys: object = None) -> None:
    for name in [name for name in layer._buffers if _CAST in name]:
        delattr(layer, name)
    layer.pack()


def type_under_autocast(x: Tensor) -> torch.dtype | None:
    """Return the 16-bit type of autocast where it is on."""
    if not isinstance(x, Tensor):  # what torch.fx has in its place
        return None
    device = x.device.type
    if device == "meta" or not torch.is_autocast_enabled(device) or x.dtype == torch.float64:
        return None
    dtype = torch.get_autocast_dtype(device)
    return dtype if dtype in _NAMES else None


def _is_capturing(x: Tensor) -> bool:
    """Return whether a CUDA graph is being captured: what is made then has contents only while it replays."""
    return is_on_gpu(x) and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _product(x: Tensor, weight: Tensor, bias: Tensor, activation: Activation = Activation.NONE) -> Tensor:
    """Multiply the pixels of a map with a matrix (C', C), then activate: (B, C, H, W) -> (B, C', H, W)."""
    batch, _, height, width = x.shape
    rows = x.permute(0, 2, 3, 1).flatten(0, 2)  # a view of a slice of channels, too
    if activation is Activation.RELU and is_on_gpu(x) and not _is_plain(x):
        y = torch._addmm_activation(bias, rows.to(weight.dtype), weight.t())  # its ReLU costs no pass of its own
    else:
        y = activation.apply(F.linear(rows, weight, bias))
    return y.unflatten(0, (batch, height, width)).permute(0, 3, 1, 2)


def _is_plain(x: Tensor) -> bool:
    """Return whether only operators with a gradient, or known outside of PyTorch, will do."""
    return (torch.is_grad_enabled() and x.requires_grad) or is_exporting()


class FoldedPointwise(Packed):
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
        self.kernel_weights = (self.panels, self.bias)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if (kernels := cpu_layers.serve(x)) is not None:
            return kernels.pointwise(x, self.panels, self.bias, residual, int(self.activation))
        y = _product(x, self.read("weight", x), self.read("bias", x), self.activation)
        return y if residual is None else y + residual

    def halves(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the two halves of the output's channels: on PyTorch as two products, neither a slice of a larger map.

        A convolution of a slice would be given a copy of it.
        """
        if cpu_layers.serve(x) is not None:
            first, second = self(x).chunk(2, dim=1)
            return first, second
        first_weight, second_weight = self.read("weight", x).chunk(2)
        first_bias, second_bias = self.read("bias", x).chunk(2)
        first = _product(x, first_weight, first_bias, self.activation)
        return first, _product(x, second_weight, second_bias, self.activation)


class FoldedDepthwise(Packed):
    """Depthwise convolution: (B, C, H, W) -> (B, C, H', W'), then optionally scaled and shifted.

    Args:
        conv: Depthwise, with a square kernel.
        activation: Applied to the result.
        affine: Depthwise 1 x 1 convolution with bias that follows the activation.
    """

    def __init__(
        self, conv: nn.Conv2d, activation: Activation = Activation.NONE, *, affine: nn.Conv2d | None = None
    ) -> None:
        super().__init__()
        self.activation = activation
        self.stride, self.padding, self.groups = conv.stride[0], conv.padding[0], conv.groups
        self.weight = _frozen(conv.weight)
        self.bias = None if conv.bias is None else _frozen(conv.bias)
        self.scale = None if affine is None else _frozen(affine.weight.flatten())
        self.shift = None if affine is None else _frozen(affine.bias)
        self.pack()

    def pack(self) -> None:
        self.taps = layouts.depthwise(self.weight)
        self.taps_bias = self.weight.new_zeros(len(self.weight)) if self.bias is None else self.bias.detach()
        self.kernel_weights = (self.taps, self.taps_bias)

    def take_bias(self) -> Tensor:
        """Return the bias (C,), which the layer then no longer has: for layers behind it that can add it at no cost."""
        bias = self.taps_bias
        self.bias = None
        self.pack()
        return bias

    def forward(self, x: Tensor) -> Tensor:
        if (kernels := cpu_layers.serve(x)) is not None:
            affine = (self.scale, self.shift, self.stride, self.padding, int(self.activation))
            return kernels.depthwise(x, self.taps, self.taps_bias, *affine)
        # A library would copy a slice of channels anyway; torch.compile writes the copy with what comes before.
        x = x.contiguous(memory_format=torch.channels_last)
        bias = None if self.bias is None else self.read("bias", x)
        y = F.conv2d(x, self.read("weight", x), bias, self.stride, self.padding, groups=self.groups)
        y = self.activation.apply(y)
        if self.scale is None:
            return y
        # Multiplied, not convolved: some CPUs and sizes would do a depthwise 1 x 1 channel by channel.
        return torch.addcmul(self.read("shift", x).view(-1, 1, 1), y, self.read("scale", x).view(-1, 1, 1))


class FoldedFFN(nn.Module):
    """Feed-forward with its residual, and the depthwise convolution before it: (B, C, H, W) -> (B, C, H, W).

    One more residual is added where it is given.
    """

    def __init__(self, depthwise: FoldedDepthwise | None, widen: FoldedPointwise, narrow: FoldedPointwise) -> None:
        super().__init__()
        self.depthwise = depthwise
        self.widen = widen
        self.narrow = narrow

    def kernel_weights(self) -> list[Tensor | None]:
        """Return the weights in the order of the kernels."""
        before = (None, None) if self.depthwise is None else self.depthwise.kernel_weights
        return [*before, *self.widen.kernel_weights, *self.narrow.kernel_weights]

    def set_depthwise(self, depthwise: FoldedDepthwise) -> None:
        """Put a convolution before it, whose bias b goes into those behind it: (y + b) W + c is y W + (b W + c)."""
        bias = depthwise.take_bias().double()
        self.depthwise = depthwise
        self.widen.bias.data += self.widen.weight.double() @ bias
        self.narrow.bias.data += bias

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if (kernels := cpu_layers.serve(x)) is not None:
            return kernels.ffn(x, *self.kernel_weights(), residual)
        if self.depthwise is not None:
            x = self.depthwise(x)
        y = self.narrow(self.widen(x), x)
        return y if residual is None else y + residual


class FoldedConvs(Packed):
    """Convolutions over all channels, one after the other, a ReLU between them: (B, C, H, W) -> (B, C', H', W').

    Args:
        convs: With square kernels alike, and bias.
        activation: Applied to the last one's result.
    """

    def __init__(self, convs: Sequence[nn.Conv2d], activation: Activation = Activation.NONE) -> None:
        super().__init__()
        self.activations = [*[Activation.RELU] * (len(convs) - 1), activation]
        first = convs[0]
        self.shape = (first.kernel_size[0], first.stride[0], first.padding[0])
        self.channels = [conv.out_channels for conv in convs]
        self.weights = nn.ParameterList(_frozen(conv.weight) for conv in convs)
        self.biases = nn.ParameterList(_frozen(conv.bias) for conv in convs)
        self.pack()

    def pack(self) -> None:
        # As matrices (height * width * C, C').
        self.panels = [layouts.columns(weight.permute(2, 3, 1, 0).flatten(0, 2)) for weight in self.weights]
        self.kernel_weights = (*self.panels, *self.biases)
        weights, biases = self.padded() if is_on_gpu(self.weights[0]) else (self.weights, self.biases)
        for index, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
            self.register_buffer(f"weight{index}", weight.detach(), persistent=False)
            self.register_buffer(f"bias{index}", bias.detach(), persistent=False)

    def padded(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return weights and biases with zeros, so that maps between two convolutions have channels for vector units.

        The weights are laid out channels-last, as the library reads them.
        """
        weights, biases, added = [], [], 0
        for index, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            inputs_added, added = added, 0 if index + 1 == len(self.weights) else -len(weight) % _ALIGNMENT
            padded = F.pad(weight.detach(), (0, 0, 0, 0, 0, inputs_added, 0, added))
            weights.append(padded.contiguous(memory_format=torch.channels_last))
            biases.append(F.pad(bias.detach(), (0, added)))
        return weights, biases

    def forward(self, x: Tensor) -> Tensor:
        if (kernels := cpu_layers.serve(x)) is not None:
            return self.activations[-1].apply(kernels.convs(x, self.panels, list(self.biases), *self.shape))
        for index in range(len(self.weights)):
            x = self._convolve(x, index)
        return x

    def forward_intermediates(self, x: Tensor) -> list[Tensor]:
        """Return the map after each convolution and its activation, without the zeros added to its channels."""
        maps = []
        for index, channels in enumerate(self.channels):
            x = self._convolve(x, index)
            maps.append(x[:, :channels])
        return maps

    def _convolve(self, x: Tensor, index: int) -> Tensor:
        activation = self.activations[index]
        if (kernels := cpu_layers.serve(x)) is not None:
            return activation.apply(kernels.convs(x, [self.panels[index]], [self.biases[index]], *self.shape))
        x = x.contiguous(memory_format=torch.channels_last)
        _, stride, padding = self.shape
        weight, bias = self.read(f"weight{index}", x), self.read(f"bias{index}", x)
        return activation.apply(F.conv2d(x, weight, bias, stride, padding))


class FoldedSqueezeExcite(nn.Module):
    """Squeeze-excite: every channel times a gate made of the means of all: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, reduce: FoldedPointwise, expand: FoldedPointwise) -> None:
        super().__init__()
        self.reduce = reduce
        self.expand = expand

    def kernel_weights(self) -> list[Tensor | None]:
        """Return the weights in the order of the kernels."""
        return [*self.reduce.kernel_weights, *self.expand.kernel_weights]

    def forward(self, x: Tensor) -> Tensor:
        if (kernels := cpu_layers.serve(x)) is not None:
            return kernels.squeeze_excite(x, *self.kernel_weights())
        gate = x.mean((2, 3), keepdim=True)
        gate = self.reduce(gate)
        gate = self.expand(gate)
        return x * gate.sigmoid()


class FoldedSS2D(Packed, SS2D):
    """SS2D with its batch norms folded: (B, C, H, W) -> (B, C, H, W).

    The parameters of the scan and of its normalisation stay float32 through ``bfloat16()`` and ``half()``, as the scan
    computes in float32 and would cast them at every call; ``double()`` takes them along.

    Args:
        scan: The layer, its convolutions folded to ones with bias.
        out_proj: What takes the place of its last one.
    """

    in_proj: Any
    conv2d: Any
    out_proj: Any

    def __init__(self, scan: Any, out_proj: FoldedPointwise) -> None:
        Packed.__init__(self)
        self.scan = scan.scan
        self.in_proj = FoldedPointwise(scan.in_proj)
        self.conv2d = FoldedDepthwise(scan.conv2d, Activation.SILU)
        self.x_proj_weight = _frozen(scan.x_proj_weight)
        self.dt_projs_weight = _frozen(_widened(scan.dt_projs_weight))
        self.dt_projs_bias = _frozen(_widened(scan.dt_projs_bias))
        self.A_logs = _frozen(_widened(scan.A_logs))
        self.Ds = _frozen(_widened(scan.Ds))
        self.out_norm = scan.out_norm
        self.out_norm.weight = _frozen(_widened(scan.out_norm.weight))
        self.out_norm.bias = _frozen(_widened(scan.out_norm.bias))
        self.out_proj = out_proj
        self.pack()

    def pack(self) -> None:
        """Lay out dt_projs_weight (K, D, R) with its channels side by side on a CPU, its ranks elsewhere."""
        self.x_panels = layouts.columns(self.x_proj_weight.flatten(0, 1).t())
        self.x_bias = self.x_proj_weight.new_zeros(self.x_proj_weight.shape[:2].numel())
        weight = self.dt_projs_weight
        if weight.is_cpu:
            weight.data = weight.data.transpose(1, 2).contiguous().transpose(1, 2)
        else:
            weight.data = weight.data.contiguous()
        scan = (weight, self.dt_projs_bias, self.A_logs, self.Ds, self.out_norm.weight, self.out_norm.bias)
        self.kernel_weights = (self.x_panels, self.x_bias, *scan)

    def forward(self, x: Tensor) -> Tensor:
        x, z = self.in_proj.halves(x)
        x = self.conv2d(x)
        y = self.scan_and_gate(x.permute(0, 2, 3, 1), z.permute(0, 2, 3, 1))
        return self.out_proj(y.permute(0, 3, 1, 2))

    def _project(self, sequence: Tensor, x_weight: Tensor) -> Tensor:
        weight = self.read("x_proj_weight", sequence) if x_weight is self.x_proj_weight else x_weight
        return super()._project(sequence, weight)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FoldedSS2D:
        scan = (self.dt_projs_weight, self.dt_projs_bias, self.A_logs, self.Ds, *self.out_norm.parameters())

        def keep_float32(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            is_kept = moved.dtype in _NAMES and any(tensor is parameter for parameter in scan)
            return tensor.to(moved.device) if is_kept else moved

        super()._apply(keep_float32, recurse)
        return self


def _widened(tensor: Tensor) -> Tensor:
    """Return 16-bit parameters as float32."""
    return tensor.float() if tensor.dtype in _NAMES else tensor


class FoldedWTEMamba(Packed):
    """Scan plus the wavelet branch, with their scales folded: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, scan: FoldedSS2D, wt_filter: Tensor, iwt_filter: Tensor, bands: nn.Conv2d) -> None:
        super().__init__()
        self.global_atten = scan
        self.wt_filter = _frozen(wt_filter)
        self.iwt_filter = _frozen(iwt_filter)
        self.bands = bands
        self.has_haar_filters = is_haar(wt_filter) and is_haar(iwt_filter)
        self.register_load_state_dict_post_hook(_look_at_filters)
        self.pack()

    def pack(self) -> None:
        weight = self.bands.weight
        self.taps = layouts.bands(weight)
        self.kernel_weights = (self.taps,)
        # Either transform as sums gives twice what the filters give.
        is_doubled = is_on_gpu(weight) and self.has_haar_filters
        self.register_buffer("bands_weight", (0.25 * weight if is_doubled else weight).detach(), persistent=False)
        self.register_buffer("signs", haar_signs(self.wt_filter).detach(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.has_haar_filters and (kernels := cpu_layers.serve(x)) is not None:
            with without_autocast("cpu"):
                return kernels.wavelet(x, self.taps, self.global_atten(x))
        y = self.global_atten(x)
        if not (is_on_gpu(x) and self.has_haar_filters):
            bands = self._convolve(haar_bands(x, self.read("wt_filter", x)))
            return y + haar_pixels(bands, self.read("iwt_filter", x), x.shape)
        signs = self.read("signs", x).to(x.dtype)
        bands = self._convolve(sums_of_pixels(x, signs))
        return y + pixels_of_sums(bands, signs, x.shape)

    def _convolve(self, bands: Tensor) -> Tensor:
        weight = self.read("bands_weight", bands)
        return F.conv2d(bands, weight, padding="same", groups=self.bands.groups)


def _look_at_filters(wavelet: FoldedWTEMamba, _incompatible_keys: object) -> None:
    wavelet.has_haar_filters = is_haar(wavelet.wt_filter) and is_haar(wavelet.iwt_filter)
    wavelet.pack()


class FoldedMixer(nn.Module):
    """The three branches, their projection and the residual around them: (B, C, H, W) -> (B, C, H, W).

    On the compiled kernels one operator, which calls none of the layers within.
    """

    global_op: Any
    local_op: Any

    def __init__(
        self, split: tuple[int, int, int], global_op: nn.Module, local_op: nn.Module, proj: FoldedPointwise
    ) -> None:
        super().__init__()
        self.split = split
        self.global_op = global_op
        self.local_op = local_op
        self.proj = proj

    def forward(self, x: Tensor) -> Tensor:
        if self.is_one_operator() and (kernels := cpu_layers.serve(x)) is not None:
            return kernels.mixer(x, self.kernel_weights(), *self.kernel_settings())
        x_global, x_local, x_identity = x.split(self.split, dim=1)
        x_global = self.global_op(x_global)
        x_local = self.local_op(x_local)
        y = join_channels(self.split, x_global, x_local, x_identity)
        return self.proj(F.relu(y, inplace=True), x)

    def is_one_operator(self) -> bool:
        """Return whether the operator computes these branches: Haar filters, pixels in one order."""
        wavelet = self.global_op
        return isinstance(wavelet, FoldedWTEMamba) and wavelet.has_haar_filters and bool(wavelet.global_atten.reverse)

    def kernel_settings(self) -> tuple[tuple[int, int, int], list[int], float]:
        """Return what the operator is told besides: the split, which directions run backwards, epsilon of the norm."""
        scan = self.global_op.global_atten
        return self.split, scan.reverse, scan.out_norm.eps

    def kernel_weights(self) -> list[Tensor]:
        """Return the weights in the order of csrc/layers/mixer.cpp."""
        wavelet, local = self.global_op, self.local_op
        scan = wavelet.global_atten
        none = scan.x_bias[:0]
        return [
            *scan.in_proj.kernel_weights,
            *scan.conv2d.kernel_weights,
            *scan.kernel_weights,
            *scan.out_proj.kernel_weights,
            *wavelet.kernel_weights,
            *((*local.kernel_weights, local.scale, local.shift) if self.split[1] else (none, none, none, none)),
            *self.proj.kernel_weights,
        ]


class FoldedBlock(nn.Module):
    """A block of folded parts, and the residual around it: (B, C, H, W) -> (B, C, H, W).

    On the compiled kernels one operator.
    """

    def __init__(self, ffn0: FoldedFFN, mixer: FoldedMixer, ffn1: FoldedFFN) -> None:
        super().__init__()
        self.ffn0 = ffn0
        self.mixer = mixer
        self.ffn1 = ffn1

    def forward(self, x: Tensor) -> Tensor:
        if (kernels := _serve_whole(self, x)) is not None and self.is_one_operator():
            return kernels.block(x, self.kernel_weights(), *self.mixer.kernel_settings())
        y = self.ffn0(x)
        y = self.mixer(y)
        return self.ffn1(y, x)

    def is_one_operator(self) -> bool:
        """Return whether the parts are those that the operator computes."""
        parts: Any = self._modules
        return _kinds_of(self) == [FoldedFFN, FoldedMixer, FoldedFFN] and parts["mixer"].is_one_operator()

    def kernel_weights(self) -> list[Tensor | None]:
        """Return the weights in the order of the kernels."""
        parts: Any = self._modules
        return [weight for part in parts.values() for weight in part.kernel_weights()]


class FoldedPatchMerging(nn.Sequential):
    """The downsampling of folded parts: (B, C, H, W) -> (B, C', ceil(H/2), ceil(W/2)).

    On the compiled kernels one operator.
    """

    def forward(self, x: Tensor) -> Tensor:
        if (kernels := _serve_whole(self, x)) is not None and self.is_one_operator():
            return kernels.patch_merging(x, self.kernel_weights())
        return super().forward(x)

    def is_one_operator(self) -> bool:
        """Return whether the parts are those that the operator computes."""
        return _kinds_of(self) == [FoldedPointwise, FoldedDepthwise, FoldedSqueezeExcite, FoldedPointwise]

    def kernel_weights(self) -> list[Tensor | None]:
        """Return the weights in the order of the kernels."""
        parts: Any = self._modules
        widen, depthwise, excite, narrow = parts.values()
        return [
            *widen.kernel_weights,
            *depthwise.kernel_weights,
            *excite.kernel_weights(),
            *narrow.kernel_weights,
        ]


def _kinds_of(module: nn.Module) -> list[type[nn.Module | None]]:
    return [type(part) for part in module._modules.values()]


def _serve_whole(module: nn.Module, x: Tensor) -> Any | None:
    """Return the kernels if they are to run a module's parts as one operator: nobody watches the parts."""
    kernels = cpu_layers.serve(x)
    parts: Any = module._modules.values()
    if kernels is None or any(part._forward_hooks or part._forward_pre_hooks for part in parts):
        return None
    return None if not torch.compiler.is_compiling() and torch_modules._has_any_global_hook() else kernels


class FoldedLinear(Packed, nn.Linear):
    """The classifier with its batch norm folded: (B, C) -> (B, num_classes).

    Args:
        weight: (num_classes, C).
        bias: (num_classes,).
    """

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        Packed.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.weight = _frozen(weight)
        self.bias = _frozen(bias)
        self.pack()

    def pack(self) -> None:
        self.kernel_weights = (layouts.columns(self.weight.t()), self.bias)

    def forward(self, x: Tensor) -> Tensor:
        if (kernels := cpu_layers.serve(x)) is not None:
            y = kernels.pointwise(x[..., None, None], *self.kernel_weights, None, int(Activation.NONE)).flatten(1)
            return y.to(type_under_autocast(x) or y.dtype)
        return F.linear(x, self.read("weight", x), self.read("bias", x))
