"""MobileMamba with its scan written out tensor by tensor: what the network costs without a kernel for it.

For comparison only. Same weights, same logits, but NCHW throughout, both directions and the time steps materialised,
a Python loop over the positions, layout copies around the normalisation, merge, gate and activations each on its own.
B batch, C channels, D inner channels, H height, W width, L = H * W, K = 2 directions, N state, R rank of the time step.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from model.layers import BatchNormLinear, ConvBN
from model.lib_mamba import SS2D
from model.mobilemamba import VARIANTS, MobileMamba
from model.mobilemamba.blocks import Block, DepthwiseFFN, PatchMerging, Stem
from model.mobilemamba.mixer import MKDeConv
from model.mobilemamba.wavelet import WTEMamba

__all__ = ["LiteralMobileMamba", "create_literal", "literal_core", "literal_scan"]

NUM_DIRECTIONS = 2


def literal_scan(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D_skip: Tensor) -> Tensor:
    """Scan every channel from the first position to the last, one position after the other.

    Args:
        x: Sequences, (B, K * D, L).
        delta: Time steps, (B, K * D, L).
        A: (K * D, N).
        B: Input matrices, (B, K, N, L).
        C: Output matrices, (B, K, N, L).
        D_skip: (K * D,).

    Returns:
        (B, K * D, L) in float32, the type of the state.
    """
    x, delta, A, B, C, D_skip = (tensor.float() for tensor in (x, delta, A, B, C, D_skip))
    channels = x.shape[1] // B.shape[1]
    B = B.repeat_interleave(channels, dim=1)  # (B, K * D, N, L)
    C = C.repeat_interleave(channels, dim=1)
    decay = torch.exp(delta.unsqueeze(2) * A.unsqueeze(-1))
    inputs = (delta * x).unsqueeze(2) * B
    state = torch.zeros_like(inputs[..., 0])
    outputs = []
    # unbind and stack, as indexing would cost the backward pass a zero tensor of the whole length per position.
    for decay_t, input_t, C_t in zip(decay.unbind(-1), inputs.unbind(-1), C.unbind(-1), strict=True):
        state = decay_t * state + input_t
        outputs.append((state * C_t).sum(-1))
    y = torch.stack(outputs, dim=-1)
    return y + x * D_skip.unsqueeze(-1)


def literal_core(
    x: Tensor,
    z: Tensor,
    projection: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D_skip: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float = 1e-5,
) -> Tensor:
    """Return what `model.lib_mamba.gated_scan` does, spelled out, from channels-first maps.

    Args:
        x: (B, D, H, W).
        z: (B, D, H, W), before its activation.
        projection: dt, B and C of each direction in the order of that direction, (B, K, R + 2N, L).
        dt_weight: (K, D, R).
        dt_bias: (K, D).
        A_log: (K * D, N).
        D_skip: (K * D,).
        norm_weight: (D,).
        norm_bias: (D,).
        eps: Added to the variance.

    Returns:
        (B, D, H, W).
    """
    num_states = A_log.shape[1]
    sequence = x.flatten(2)
    both = torch.stack([sequence, sequence.flip(-1)], dim=1)
    dt, B, C = projection.split([dt_weight.shape[2], num_states, num_states], dim=2)
    delta = torch.einsum("bkrl,kdr->bkdl", dt, dt_weight.to(dt.dtype))
    with torch.autocast(x.device.type, enabled=False):
        delta = F.softplus(delta.float() + dt_bias.float().unsqueeze(-1))
        A = -torch.exp(A_log.float())
        y = literal_scan(both.flatten(1, 2), delta.flatten(1, 2), A, B, C, D_skip)
        forward, backward = y.unflatten(1, (NUM_DIRECTIONS, -1)).unbind(1)
        y = forward + backward.flip(-1)
        y = y.transpose(1, 2).contiguous()
        y = F.layer_norm(y, y.shape[-1:], norm_weight.float(), norm_bias.float(), eps)
    y = y.transpose(1, 2).contiguous().view_as(x).to(x.dtype)
    return y * F.silu(z)


class LiteralSS2D(nn.Module):
    """SS2D, spelled out: (B, C, H, W) -> (B, C, H, W).

    Args:
        original: Whose parameters are taken over, under the same names. Bidirectional.
    """

    def __init__(self, original: SS2D) -> None:
        super().__init__()
        self.in_proj = original.in_proj
        self.conv2d = original.conv2d
        self.x_proj_weight = original.x_proj_weight
        self.dt_projs_weight = original.dt_projs_weight
        self.dt_projs_bias = original.dt_projs_bias
        self.A_logs = original.A_logs
        self.Ds = original.Ds
        self.out_norm = original.out_norm
        self.out_proj = original.out_proj

    def forward(self, x: Tensor) -> Tensor:
        """Run it."""
        x, z = self.in_proj(x).chunk(2, dim=1)
        x = F.silu(self.conv2d(x))
        sequence = x.flatten(2)
        both = torch.stack([sequence, sequence.flip(-1)], dim=1)
        projection = torch.einsum("bkdl,kcd->bkcl", both, self.x_proj_weight)
        y = literal_core(
            x,
            z,
            projection,
            self.dt_projs_weight,
            self.dt_projs_bias,
            self.A_logs,
            self.Ds,
            self.out_norm.weight,
            self.out_norm.bias,
            self.out_norm.eps,
        )
        return self.out_proj(y)


class LiteralWTEMamba(nn.Module):
    """WTE-Mamba with the transform as two convolutions: (B, C, H, W) -> (B, C, H, W).

    Args:
        original: Whose parts are taken over, under the same names.
    """

    def __init__(self, original: WTEMamba) -> None:
        super().__init__()
        self.wt_filter = original.wt_filter
        self.iwt_filter = original.iwt_filter
        self.global_atten = LiteralSS2D(original.global_atten)
        self.base_scale = original.base_scale
        self.wavelet_convs = original.wavelet_convs
        self.wavelet_scale = original.wavelet_scale

    def forward(self, x: Tensor) -> Tensor:
        """Run it."""
        channels, height, width = x.shape[1:]
        y = self.base_scale(self.global_atten(x))
        x = F.pad(x, (0, width % 2, 0, height % 2))
        bands = F.conv2d(x, self.wt_filter, stride=2, groups=channels)
        bands = self.wavelet_scale[0](self.wavelet_convs[0](bands))
        x = F.conv_transpose2d(bands, self.iwt_filter, stride=2, groups=channels)
        return y + x[..., :height, :width]


class _LayerByLayer(nn.Module):
    """Has the children of another module, under the same names, to run them in its own way.

    Args:
        original: Whose children are taken over.
    """

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        for name, child in original.named_children():
            self.add_module(name, child)


class LiteralBlock(_LayerByLayer):
    """A block, layer by layer: (B, C, H, W) -> (B, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        """Run it."""
        y = self.mixer(self.ffn0(self.dw0(x)))
        return x + self.drop_path(self.ffn1(self.dw1(y)))


class LiteralPatchMerging(_LayerByLayer):
    """The downsampling, layer by layer: (B, C, H, W) -> (B, C', ceil(H/2), ceil(W/2))."""

    def forward(self, x: Tensor) -> Tensor:
        """Run it."""
        x = F.relu(self.conv2(F.relu(self.conv1(x), inplace=True)), inplace=True)
        return self.conv3(self.se(x))


class LiteralMobileMamba(MobileMamba):
    """The network in NCHW, layer by layer, with its mixers spelled out. Same arguments, same state dict.

    Args:
        **kwargs: Of `MobileMamba`.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        _replace(self, {WTEMamba: LiteralWTEMamba, Block: LiteralBlock, PatchMerging: LiteralPatchMerging})
        _replace(self, {Stem: _sequence, DepthwiseFFN: _sequence})

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the last feature map, in the layout of the input."""
        x = self.patch_embed(x)
        x = self.blocks1(x)
        x = self.blocks2(x)
        return self.blocks3(x)

    @torch.no_grad()
    def fuse(self) -> LiteralMobileMamba:
        """Fold every batch norm into its convolution or linear layer, in place, and nothing else."""
        self.eval()
        _replace(self, {ConvBN: _fold_conv, MKDeConv: _fold_local, BatchNormLinear: _fold_linear})
        return self


def create_literal(name: str) -> LiteralMobileMamba:
    """Return the literal network of a variant, by the variant's name."""
    return LiteralMobileMamba(**VARIANTS[name])


def _replace(module: nn.Module, replacements: dict[type[nn.Module], Any]) -> None:
    """Put ``replacements[type](child)`` in the place of every child of these types."""
    for name, child in list(module.named_children()):
        _replace(child, replacements)
        if type(child) in replacements:
            setattr(module, name, replacements[type(child)](child))


def _sequence(module: nn.Sequential) -> nn.Sequential:
    return nn.Sequential(*module)


def _fold_conv(module: ConvBN) -> nn.Conv2d:
    return fuse_conv_bn_eval(module.c, module.bn)


def _fold_local(module: MKDeConv) -> nn.Sequential:
    return nn.Sequential(
        fuse_conv_bn_eval(module.dwconv3x3, module.bn1),
        nn.ReLU(),
        fuse_conv_bn_eval(module.dwconv1x1, module.bn2),
    )


def _fold_linear(module: BatchNormLinear) -> nn.Linear:
    bn, linear = module.bn, module.l
    scale = bn.weight / torch.sqrt(bn.running_var + bn.eps)
    shift = bn.bias - bn.running_mean * scale
    linear.bias += linear.weight @ shift
    linear.weight *= scale
    return linear
