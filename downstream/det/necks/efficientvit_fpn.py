"""A feature pyramid whose finer levels are learnt: for backbones that start at stride 16.

`lateral_convs`, `fpn_convs`, `extra_trans_convs` and `extra_fpn_convs` are the names of the released checkpoints.
B batch, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from mmcv.cnn import ConvModule
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from torch import Tensor, nn

__all__ = ["EfficientViTFPN"]

XAVIER = {"type": "Xavier", "layer": "Conv2d", "distribution": "uniform"}


@MODELS.register_module(force=True)
class EfficientViTFPN(BaseModule):
    """Lin et al.'s feature pyramid (arXiv 1612.03144), with finer levels by transposed convolution.

    From k maps, finest first, to `num_outs`: `num_extra_trans_convs` levels finer than the inputs, the k inputs' own,
    and what is then missing coarser than them.

    Args:
        in_channels: Channels of the inputs, finest first.
        out_channels: C of every output.
        num_outs: Number of outputs.
        num_extra_trans_convs: Number of finer levels, each of twice the height and width of the next.
        add_extra_convs: How coarser levels arise: False, the last output at every second pixel; "on_input",
            a 3 x 3 convolution of stride 2 on the last input, then on what came of it.
        init_cfg: How weights start.

    Raises:
        ValueError: `num_outs` is too small, or `add_extra_convs` unknown; in `forward`, the number of maps is wrong.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        out_channels: int,
        num_outs: int,
        *,
        num_extra_trans_convs: int = 0,
        add_extra_convs: bool | str = False,
        init_cfg: dict | None = XAVIER,
    ) -> None:
        super().__init__(init_cfg=init_cfg)
        num_coarser = num_outs - len(in_channels) - num_extra_trans_convs
        if num_coarser < 0:
            levels = f"{len(in_channels)} inputs and {num_extra_trans_convs} finer levels"
            raise ValueError(f"{levels} make more than num_outs={num_outs} outputs")
        if add_extra_convs not in (False, "on_input"):
            raise ValueError(f"add_extra_convs must be False or 'on_input', got {add_extra_convs!r}")
        self.num_coarser = num_coarser
        self.add_extra_convs = add_extra_convs
        self.lateral_convs = nn.ModuleList(_conv(channels, out_channels, 1) for channels in in_channels)
        self.fpn_convs = nn.ModuleList(_conv(out_channels, out_channels, 3) for _ in in_channels)
        if add_extra_convs:
            sources = [in_channels[-1], *[out_channels] * num_coarser][:num_coarser]
            self.fpn_convs.extend(_conv(channels, out_channels, 3, stride=2) for channels in sources)
        finer = range(num_extra_trans_convs)
        self.extra_trans_convs = nn.ModuleList(_twice_as_fine(out_channels) for _ in finer)
        self.extra_fpn_convs = nn.ModuleList(_conv(out_channels, out_channels, 3) for _ in finer)

    def forward(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        if len(inputs) != len(self.lateral_convs):
            raise ValueError(f"the neck has in_channels for {len(self.lateral_convs)} maps and got {len(inputs)}")
        laterals = [conv(x) for conv, x in zip(self.lateral_convs, inputs, strict=True)]
        for level in range(len(laterals) - 1, 0, -1):
            size = laterals[level - 1].shape[-2:]
            laterals[level - 1] = laterals[level - 1] + F.interpolate(laterals[level], size=size, mode="nearest")
        outs = [conv(x) for conv, x in zip(self.fpn_convs, laterals, strict=False)]
        outs += self._coarser(inputs[-1], outs[-1])
        return (*self._finer(laterals[0]), *outs)

    def _coarser(self, last_input: Tensor, last_output: Tensor) -> list[Tensor]:
        levels = []
        x = last_input if self.add_extra_convs else last_output
        for level in range(self.num_coarser):
            x = (
                self.fpn_convs[len(self.lateral_convs) + level](x)
                if self.add_extra_convs
                else F.max_pool2d(x, 1, stride=2)
            )
            levels.append(x)
        return levels

    def _finer(self, lateral: Tensor) -> list[Tensor]:
        """Return the finer levels, finest first: `extra_fpn_convs` have that order, `extra_trans_convs` the reverse."""
        levels: list[Tensor] = []
        for conv in self.extra_trans_convs:
            lateral = conv(lateral)
            levels.insert(0, lateral)
        return [conv(x) for conv, x in zip(self.extra_fpn_convs, levels, strict=True)]


def _conv(in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> ConvModule:
    """Return a plain convolution with bias, its weights under ``conv`` as in the checkpoints."""
    padding = kernel_size // 2
    return ConvModule(in_channels, out_channels, kernel_size, stride=stride, padding=padding, act_cfg=None)


def _twice_as_fine(channels: int) -> ConvModule:
    """Return a 2 x 2 transposed convolution of stride 2: (B, C, H, W) -> (B, C, 2H, 2W)."""
    return ConvModule(channels, channels, 2, stride=2, conv_cfg={"type": "deconv"}, act_cfg=None)
