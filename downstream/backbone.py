"""MobileMamba as an OpenMMLab backbone: ``dict(type="MobileMamba", variant="B1", ...)`` in a configuration.

The class is the network itself without its classifier, so that state-dict entries stand directly under ``backbone.``,
as in the released detectors and segmentors. B batch, C channels, H height, W width.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Sequence
from pathlib import Path

from mmengine.logging import print_log
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from model import list_models
from model.lib_mamba import set_backend
from model.mobilemamba import VARIANTS, MobileMamba

from .pretrained import FAMILY, load_pretrained, released_checkpoint

__all__ = ["MobileMambaBackbone"]

STAGES = ("patch_embed", "blocks1", "blocks2", "blocks3")


# The module may be imported twice under two names, by its package and by a path: the second registration replaces.
@MODELS.register_module("MobileMamba", force=True)
class MobileMambaBackbone(MobileMamba):
    """MobileMamba without its classifier: (B, 3, H, W) -> feature maps (B, C, H / stride, W / stride), rounded up.

    Stages are numbered 0 to 3: patch_embed, blocks1, blocks2, blocks3, at strides 16, 16, 32, 64.

    Args:
        variant: "T2", "T4", "S6", "B1", "B2" or "B4".
        out_indices: Stages whose outputs are returned. Later ones are kept, since released checkpoints have their
            entries, but never computed, and their parameters require no gradient.
        pretrained: An ImageNet checkpoint, read when training starts (`init_weights`): a path, or True for the released
            one, which is downloaded once and verified. Entries of a classifier are left out.
        ema: Take the averaged weights out of that checkpoint.
        frozen_stages: Stages 0 to this one are not trained and stay in evaluation mode; -1 freezes none.
        norm_eval: Batch norms stay in evaluation mode: running statistics are used in training, and not changed.
        sync_bn: Batch norms take statistics over all processes; CUDA only, as PyTorch's are.
        with_cp: Gradient checkpointing: less memory in training, for computing twice.
        drop_path: Probability of leaving out the last block in training, rising to it linearly from 0; the variant's
            own when None.
        scan_backend: Force what runs the scans, in the whole process; see `model.create_model`.

    Raises:
        ValueError: An argument has no meaning, or, in `init_weights`, the checkpoint does not fit.
        OSError: In `init_weights`: there is no such checkpoint, or it cannot be downloaded.
    """

    def __init__(
        self,
        variant: str,
        *,
        out_indices: Sequence[int] = (1, 2, 3),
        pretrained: bool | str = False,
        ema: bool = False,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        sync_bn: bool = False,
        with_cp: bool = False,
        drop_path: float | None = None,
        scan_backend: str = "",
    ) -> None:
        name = _known_variant(variant)
        settings = dict(VARIANTS[name])
        if drop_path is not None:
            settings["drop_path"] = drop_path
        super().__init__(num_classes=0, **settings)
        # OpenMMLab compares the `num_classes` of every module that has one with the data set's classes.
        del self.num_classes
        self.variant = name
        self.out_indices = _checked_indices(out_indices)
        if not -1 <= frozen_stages < len(STAGES):
            raise ValueError(f"frozen_stages must be -1 (none) to {len(STAGES) - 1}, got {frozen_stages}")
        self.frozen_stages = frozen_stages
        self.norm_eval = norm_eval
        self.pretrained = pretrained
        self.ema = ema
        self.set_grad_checkpointing(with_cp)
        if scan_backend:
            set_backend(scan_backend)
        if sync_bn:
            nn.SyncBatchNorm.convert_sync_batchnorm(self)
        for stage in (*self._frozen(), *self._unused()):
            stage.requires_grad_(False)

    def _frozen(self) -> list[nn.Module]:
        return [getattr(self, name) for name in STAGES[: self.frozen_stages + 1]]

    def _unused(self) -> list[nn.Module]:
        """Return the stages after the last output: DistributedDataParallel would wait for their gradients."""
        return [getattr(self, name) for name in STAGES[max(self.out_indices) + 1 :]]

    def init_weights(self) -> None:
        """Load the pretrained weights; OpenMMLab calls this when training starts, and not for testing."""
        if not self.pretrained:
            print_log(f"{self.variant} starts from random weights: backbone.pretrained names none", logger="current")
            if self.norm_eval:
                print_log(
                    "norm_eval=True keeps the batch norms of random weights from normalising: unless a checkpoint is "
                    "loaded, set model.backbone.norm_eval=False",
                    logger="current",
                    level=logging.WARNING,
                )
            return
        path = released_checkpoint(self.variant) if self.pretrained is True else Path(self.pretrained)
        load_pretrained(self, path, ema=self.ema)

    def train(self, mode: bool = True) -> MobileMambaBackbone:
        """Switch between training and evaluation; frozen stages, and norms under `norm_eval`, stay in evaluation."""
        super().train(mode)
        if not mode:
            return self
        for stage in self._frozen():
            stage.eval()
        if self.norm_eval:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        maps = self.forward_intermediates(x, self.out_indices, intermediates_only=True)
        # mmcv's RoIAlign takes any memory for that of a contiguous map; ours are channels-last.
        return tuple(x.contiguous() for x in maps)


def _known_variant(variant: str) -> str:
    name = f"{FAMILY}{variant}"
    if name not in VARIANTS:
        known = [name.removeprefix(FAMILY) for name in list_models()]
        near = difflib.get_close_matches(str(variant).removeprefix(FAMILY).upper(), known, n=1, cutoff=0.0)
        raise ValueError(f"MobileMamba has no variant {variant!r}: {', '.join(known)}; did you mean {near[0]!r}?")
    return name


def _checked_indices(out_indices: Sequence[int]) -> tuple[int, ...]:
    indices = tuple(out_indices)
    if not indices or not set(indices) <= set(range(len(STAGES))) or list(indices) != sorted(set(indices)):
        raise ValueError(
            f"out_indices must name stages 0 to {len(STAGES) - 1} ({', '.join(STAGES)}) in rising order, got {indices}"
        )
    return indices
