"""MobileMamba, the network and its six variants (arXiv 2411.15941).

The names `patch_embed`, `blocks1..3`, `head`, `head_dist` are those of the released checkpoints. B batch, C channels,
H height, W width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..layers import BatchNormLinear
from ..recompute import recompute
from . import fuse as folding
from .blocks import Block, downsample, patch_embed

__all__ = ["VARIANTS", "MobileMamba"]

MIN_SIZE = 32

# What differs between the variants. B2 and B4 are B1 at a larger input.
VARIANTS: dict[str, dict[str, Any]] = {
    "MobileMamba_T2": {"img_size": 192, "embed_dim": (144, 272, 368), "depth": (1, 2, 2), "drop_path": 0.0},
    "MobileMamba_T4": {"img_size": 192, "embed_dim": (176, 368, 448), "depth": (1, 2, 2), "drop_path": 0.0},
    "MobileMamba_S6": {"img_size": 224, "embed_dim": (192, 384, 448), "depth": (1, 2, 2), "drop_path": 0.0},
    "MobileMamba_B1": {"img_size": 256, "embed_dim": (200, 376, 448), "depth": (2, 3, 2), "drop_path": 0.03},
    "MobileMamba_B2": {"img_size": 384, "embed_dim": (200, 376, 448), "depth": (2, 3, 2), "drop_path": 0.03},
    "MobileMamba_B4": {"img_size": 512, "embed_dim": (200, 376, 448), "depth": (2, 3, 2), "drop_path": 0.03},
}


class MobileMamba(nn.Module):
    """Three-stage backbone at strides 16, 32 and 64, with a classifier: (B, 3, H, W) -> (B, num_classes).

    Args:
        num_classes: Width of the classifier; 0 returns the pooled features (B, C).
        in_chans: Channels of the input.
        img_size: Side of the input in pixels that the variant is trained at; other sizes >= 32 work too.
        embed_dim: Channels of the three stages.
        depth: Blocks of the three stages.
        global_ratio: Per stage, the share of the channels that is scanned.
        local_ratio: Per stage, the share of the channels that is convolved.
        kernels: Per stage, the side of the mixer's kernels.
        ssm_ratio: See `SS2D`.
        d_state: See `SS2D`.
        scan: See `SS2D`.
        drop_path: Probability of leaving out the last block in training, rising to it linearly from 0.
        distillation: A second head for a teacher's answers: both are returned in training, averaged in evaluation.

    Raises:
        ValueError: In `forward`, if the input is not (B, in_chans, H, W) with H and W of 32 or more.
    """

    patch_embed: nn.Sequential
    blocks1: nn.Sequential
    blocks2: nn.Sequential
    blocks3: nn.Sequential
    head: nn.Module
    head_dist: nn.Module

    def __init__(
        self,
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        img_size: int = 192,
        embed_dim: Sequence[int] = (144, 272, 368),
        depth: Sequence[int] = (1, 2, 2),
        global_ratio: Sequence[float] = (0.8, 0.7, 0.6),
        local_ratio: Sequence[float] = (0.2, 0.2, 0.3),
        kernels: Sequence[int] = (7, 5, 3),
        ssm_ratio: float = 2.0,
        d_state: int = 1,
        scan: str = "bidirectional",
        drop_path: float = 0.0,
        distillation: bool = False,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.img_size = img_size
        self.num_features = embed_dim[-1]
        self.feature_info = [
            {"num_chs": channels, "reduction": stride, "module": name}
            for channels, stride, name in zip(
                (embed_dim[0], *embed_dim),
                (16, 16, 32, 64),
                ("patch_embed", "blocks1", "blocks2", "blocks3"),
                strict=True,
            )
        ]
        self.patch_embed = patch_embed(in_chans, embed_dim[0])
        num_blocks = sum(depth)
        rates = [drop_path * index / max(num_blocks - 1, 1) for index in range(num_blocks)]
        for stage, channels in enumerate(embed_dim):
            layers = downsample(embed_dim[stage - 1], channels) if stage else []
            first = sum(depth[:stage])
            layers += [
                Block(
                    channels,
                    drop_path=rate,
                    global_ratio=global_ratio[stage],
                    local_ratio=local_ratio[stage],
                    kernel_size=kernels[stage],
                    ssm_ratio=ssm_ratio,
                    d_state=d_state,
                    scan=scan,
                )
                for rate in rates[first : first + depth[stage]]
            ]
            setattr(self, f"blocks{stage + 1}", nn.Sequential(*layers))
        self.grad_checkpointing = False
        self.distillation = distillation
        self.reset_classifier(num_classes)

    def get_classifier(self) -> nn.Module:
        """Return the head; with distillation the pair of heads."""
        return nn.ModuleList([self.head, self.head_dist]) if self.distillation else self.head

    def reset_classifier(self, num_classes: int) -> None:
        """Put a fresh head (or pair of heads) for ``num_classes`` in place; 0 removes it."""
        self.num_classes = num_classes

        def head() -> nn.Module:
            return BatchNormLinear(self.num_features, num_classes) if num_classes else nn.Identity()

        self.head = head()
        if self.distillation:
            self.head_dist = head()

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade time for memory in training: keep activations between layers alone, and compute the rest again."""
        self.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Return the names of parameters that weight decay leaves alone beside biases and 1-D parameters: none."""
        return set()

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return how parameters group into layers from the stem up, for layer-wise learning rates."""
        blocks = r"^blocks(\d+)" if coarse else r"^blocks(\d+)\.(\d+)"
        return {"stem": r"^patch_embed", "blocks": [(blocks, None)]}

    def forward_intermediates(
        self, x: Tensor, indices: Sequence[int] | None = None, *, intermediates_only: bool = False
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Return the feature maps of stages, and unless ``intermediates_only`` the last one beside them.

        Args:
            x: Images, (B, in_chans, H, W).
            indices: Which of patch_embed, blocks1, blocks2, blocks3 (0 to 3, or from the end) to return; all when
                None. What follows the last of them is not computed with ``intermediates_only``.
            intermediates_only: Return the list alone.

        Returns:
            Feature maps (B, C, H / stride, W / stride), rounded up, strides 16, 16, 32, 64.
        """
        stages = [self.patch_embed, self.blocks1, self.blocks2, self.blocks3]
        wanted = range(len(stages)) if indices is None else [range(len(stages))[index] for index in indices]
        x = self._prepare(x)
        features = []
        for stage in stages[: max(wanted) + 1] if intermediates_only else stages:
            # The stem's ReLUs work in place, on what a recomputation of single layers would need.
            x = stage(x) if stage is self.patch_embed else self._run(stage, x)
            features.append(x)
        taken = [features[index] for index in wanted]
        return taken if intermediates_only else (x, taken)

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the last feature map: (B, in_chans, H, W) -> (B, C, H/64, W/64), rounded up."""
        x = self._prepare(x)
        x = self.patch_embed(x)
        x = self._run(self.blocks1, x)
        x = self._run(self.blocks2, x)
        return self._run(self.blocks3, x)

    def _run(self, stage: nn.Sequential, x: Tensor) -> Tensor:
        """Run a stage; with gradient checkpointing, keep what stands between its layers and compute the rest again."""
        if not self.grad_checkpointing or not torch.is_grad_enabled():
            return stage(x)
        for layer in stage:
            x = recompute(layer, x)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Pool the last feature map and classify it: (B, C, H, W) -> (B, num_classes), (B, C) if ``pre_logits``."""
        x = x.mean((2, 3))
        if pre_logits:
            return x
        if not self.distillation:
            return self.head(x)
        logits, logits_dist = self.head(x), self.head_dist(x)
        return (logits, logits_dist) if self.training else (logits + logits_dist) / 2

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        return self.forward_head(self.forward_features(x))

    def _prepare(self, x: Tensor) -> Tensor:
        """Check the input and lay it out channels-last, which all that follows keeps: the scan reads it uncopied."""
        if x.dim() != 4 or x.shape[1] != self.in_chans or x.shape[2] < MIN_SIZE or x.shape[3] < MIN_SIZE:
            expected = f"(B, {self.in_chans}, H, W) with H and W of {MIN_SIZE} pixels or more"
            raise ValueError(f"input must be {expected}, got {tuple(x.shape)}")
        return x.contiguous(memory_format=torch.channels_last)

    def fuse(self) -> MobileMamba:
        """Fold for inference, in place: batch norms, scales and residual depthwise convolutions into their neighbours.

        The output stays the same; the state dict does not, so load weights before. Puts the network into evaluation
        mode, which a folded network cannot leave usefully.

        Returns:
            The network itself.
        """
        return folding.fuse(self)
