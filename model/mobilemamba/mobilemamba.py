"""MobileMamba, the network and its six variants (arXiv 2411.15941).

The names `patch_embed`, `blocks1..3`, `head`, `head_dist` are those of the released checkpoints. B batch, C channels,
H height, W width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers import BatchNorm2d, BatchNormLinear, count_batch, is_on_gpu
from ..lib_mamba import cpu_layers
from ..recompute import recompute
from .blocks import Block, Stem, downsample, patch_embed
from .folded_layers import average, is_folded, type_under_autocast
from .folded_network import Plan
from .fuse import fuse
from .wavelet import WTEMamba

__all__ = ["POOLINGS", "VARIANTS", "MobileMamba", "check_images"]

MIN_SIZE = 32
POOLINGS = ("avg", "max", "")
STEM = "patch_embed"

# The settings that differ between the variants. B2 and B4 are B1 at a larger input.
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
        global_pool: Pooling of the last feature map: "avg" (the released networks), "max", or "" for none, with
            ``num_classes`` 0.
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
        drop_rate: Probability with which a pooled feature is zeroed in training.
        distillation: A second head for a teacher's answers: both are returned in training, averaged in evaluation.
        stem_features: Count the stem's maps at strides 2, 4 and 8 as features, in place of its last one: see
            `forward_intermediates`.

    The methods and attributes other than `forward` and `fuse` are those of timm's networks.

    Attributes:
        feature_info: What `forward_intermediates` can return, in order: ``num_chs`` channels at the stride
            ``reduction``, from the attribute ``module``.
        default_cfg: timm's record of a network, as is `pretrained_cfg`: size and normalisation of its input, origin of
            its weights. Empty unless `create_model` or timm built it.
        model_args: The arguments that differ from the variant's, as `create_model` or timm was given them.

    Raises:
        ValueError: If ``global_pool`` is unknown or leaves no vector to classify; in `forward`, if the input is not
            (B, in_chans, H, W) with H and W of 32 or more.
        TypeError: In `forward`, if the images are of another type than the weights.
    """

    patch_embed: Stem
    blocks1: nn.Sequential
    blocks2: nn.Sequential
    blocks3: nn.Sequential
    head: nn.Module
    head_dist: nn.Module
    global_pool: str
    feature_info: list[dict[str, Any]]
    default_cfg: dict[str, Any]
    pretrained_cfg: dict[str, Any]
    model_args: dict[str, Any]
    _plan: Plan | None = None

    def __init__(
        self,
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
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
        drop_rate: float = 0.0,
        distillation: bool = False,
        stem_features: bool = False,
    ) -> None:
        super().__init__()
        self.in_chans = in_chans
        self.img_size = img_size
        self.num_features = self.head_hidden_size = embed_dim[-1]
        self.drop_rate = drop_rate
        self.default_cfg = self.pretrained_cfg = {}
        self.model_args = {}
        stem = [(embed_dim[0], 16, STEM)]
        if stem_features:  # after the first three ReLUs
            stem = [(embed_dim[0] // 2**level, 16 // 2**level, f"{STEM}.{7 - 2 * level}") for level in (3, 2, 1)]
        stages = zip(embed_dim, (16, 32, 64), ("blocks1", "blocks2", "blocks3"), strict=True)
        self.feature_info = [
            {"num_chs": channels, "reduction": stride, "module": name} for channels, stride, name in (*stem, *stages)
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
        self.reset_classifier(num_classes, global_pool)
        self._find_norms()

    def train(self, mode: bool = True) -> MobileMamba:
        super().train(mode)
        self._find_norms()
        return self

    def _apply(self, *arguments: Any, **options: Any) -> MobileMamba:
        super()._apply(*arguments, **options)
        self._plan = None  # it would keep the weights as they were in memory
        self._find_norms()
        return self

    def _find_norms(self) -> None:
        """Note the batch norms whose batches `_enter` counts; again after each change that may have replaced some."""
        self._norms = [module for module in self.modules() if isinstance(module, BatchNorm2d)]
        for norm in self._norms:
            norm.is_counted = True

    def _enter(self, x: Tensor) -> Tensor:
        """Check images (B, in_chans, H, W) and lay them out; count the batch, where the layers do not themselves."""
        check_images(x, self.in_chans, next(self.patch_embed.parameters()))
        if not is_folded(self):  # the scan reads it without a copy; a folded stem takes any layout
            x = x.contiguous(memory_format=torch.channels_last)
        if self.training and is_on_gpu(x):
            count_batch(self._norms)
        return x

    def init_non_persistent_buffers(self) -> None:
        """Settle down after transformers has loaded weights, which it does past `load_state_dict`.

        It makes every parameter trainable, the Haar filters too, and maps the file: there tensors lie at any address,
        where libraries add up in another order and slower. (timm and transformers call the method by this name.)
        """
        for parameter in self.parameters():
            parameter.data = parameter.data.clone()
        for module in self.modules():
            if isinstance(module, WTEMamba):
                module.settle_filters()

    def get_classifier(self) -> nn.Module:
        """Return the head; with distillation the pair of heads."""
        return nn.ModuleList([self.head, self.head_dist]) if self.distillation else self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head (or pair of heads) by a fresh one for ``num_classes``, on the same device; 0 removes it.

        Args:
            num_classes: Width of the classifier.
            global_pool: One of `POOLINGS`; the present one when None.
        """
        global_pool = self.global_pool if global_pool is None else global_pool
        if global_pool not in POOLINGS:
            raise ValueError(f"global_pool must be one of {', '.join(map(repr, POOLINGS))}, got {global_pool!r}")
        if num_classes and not global_pool:
            raise ValueError(f"global_pool='' leaves no vector to classify into {num_classes}: set num_classes=0")
        self.num_classes = num_classes
        self.global_pool = global_pool
        like = next(self.parameters())

        def head() -> nn.Module:
            if not num_classes:
                return nn.Identity()
            return BatchNormLinear(self.num_features, num_classes).to(like.device, like.dtype).train(self.training)

        self.head = head()
        if self.distillation:
            self.head_dist = head()

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade time for memory in training: keep only the activations between layers and recompute the rest."""
        self.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Return the names of parameters without weight decay besides biases and 1-D parameters: none."""
        return set()

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return how parameters group into layers from the stem up, for layer-wise learning rates."""
        blocks = r"^blocks(\d+)" if coarse else r"^blocks(\d+)\.(\d+)"
        return {"stem": r"^patch_embed", "blocks": [(blocks, None)]}

    def forward_intermediates(  # positions and names of the arguments are timm's
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Return feature maps, and unless ``intermediates_only`` the last stage's with them.

        Args:
            x: Images, (B, in_chans, H, W).
            indices: Which entries of `feature_info` to return (counted from 0, or from the end); the last ones if a
                number; all when None. They are patch_embed, blocks1, blocks2, blocks3 at strides 16, 16, 32, 64; with
                ``stem_features`` three maps of the stem at strides 2, 4, 8 and these blocks.
            norm: There is no normalisation after a stage: changes nothing.
            stop_early: Do not compute what follows the last of them; implied by ``intermediates_only``.
            output_fmt: "NCHW", the only one.
            intermediates_only: Return only the list.

        Returns:
            Feature maps (B, C, H / stride, W / stride), rounded up.

        Raises:
            ValueError: If a feature is not there, or ``output_fmt`` is another.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt must be 'NCHW', got {output_fmt!r}")
        names = [self.feature_info[index]["module"] for index in self._feature_indices(indices)]
        stages = self._stages()
        if stop_early or intermediates_only:
            stages = stages[: max(stages.index(_stage_of(name)) for name in names) + 1]
        x = self._enter(x)
        maps: dict[str, Tensor] = {}
        for stage in stages:
            if stage == STEM and any(name.startswith(f"{STEM}.") for name in names):
                inner = self.patch_embed.forward_intermediates(x)
                maps |= {f"{STEM}.{2 * index + 1}": x for index, x in enumerate(inner)}
                x = inner[-1]
            else:
                x = self._run(stage, x)
            maps[stage] = x
        taken = [maps[name] for name in names]
        return taken if intermediates_only else (x, taken)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove, in place, what `forward_intermediates` does not need for some features.

        Args:
            indices: The features, as for `forward_intermediates`.
            prune_norm: There is no normalisation after a stage: changes nothing.
            prune_head: Remove the head even where all stages stay; it goes with the last stage anyway.

        Returns:
            The indices, counted from the start.

        Raises:
            ValueError: If a feature is not there, or a folded stem would have to be cut.
        """
        wanted = self._feature_indices(indices)
        num_kept = max(wanted) + 1
        stages = self._stages()
        is_cut = num_kept < len(self.feature_info)
        last = self.feature_info[num_kept - 1]["module"]
        if last.startswith(f"{STEM}."):
            if is_folded(self):
                raise ValueError("a folded stem is one layer, which cannot be cut: prune before fuse()")
            del self.patch_embed[2 * num_kept :]
        for stage in stages[stages.index(_stage_of(last)) + 1 :]:
            delattr(self, stage)
        self.feature_info = self.feature_info[:num_kept]
        self.num_features = self.head_hidden_size = self.feature_info[-1]["num_chs"]
        if prune_head or is_cut:
            self.reset_classifier(0, "")
        return wanted

    def _feature_indices(self, indices: int | Sequence[int] | None) -> list[int]:
        """Return indices of features, counted from the start; a number means so many of the last."""
        num_features = len(self.feature_info)
        if indices is None:
            return list(range(num_features))
        asked = list(range(-indices, 0)) if isinstance(indices, int) else list(indices)
        if not asked or not all(-num_features <= index < num_features for index in asked):
            names = ", ".join(info["module"] for info in self.feature_info)
            raise ValueError(f"indices must be of {num_features} features ({names}; or from the end), got {indices}")
        return [index % num_features for index in asked]

    def _stages(self) -> list[str]:
        """Return the names of the stages that are there, in order."""
        return list(dict.fromkeys(_stage_of(info["module"]) for info in self.feature_info))

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the last feature map: (B, in_chans, H, W) -> (B, C, H/64, W/64), rounded up."""
        x = self._enter(x)
        for stage in self._stages():
            x = self._run(stage, x)
        return x

    def _run(self, name: str, x: Tensor) -> Tensor:
        """Run a stage; with gradient checkpointing, keep what passes between its layers and recompute the rest."""
        stage = getattr(self, name)
        if name == STEM or not self.grad_checkpointing or not torch.is_grad_enabled():
            return stage(x)
        for layer in stage:
            x = recompute(layer, x)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Pool the last feature map and classify it: (B, C, H, W) -> (B, num_classes), (B, C) if ``pre_logits``."""
        if self.global_pool == "avg":
            x = average(x) if is_folded(self) else x.mean((2, 3))
        elif self.global_pool:
            x = x.amax((2, 3))
        if self.drop_rate:
            x = F.dropout(x, self.drop_rate, self.training)
        if pre_logits:
            return x
        if not self.distillation:
            return self.head(x)
        logits, logits_dist = self.head(x), self.head_dist(x)
        return (logits, logits_dist) if self.training else (logits + logits_dist) / 2

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        if is_folded(self) and (answer := self._run_as_one(x)) is not None:
            return answer
        return self.forward_head(self.forward_features(x))

    def _run_as_one(self, x: Tensor) -> Tensor | None:
        """Return a folded network's answer by one operator, where there is one and nobody wants to see the layers."""
        kernels = cpu_layers.serve_network(x)
        if kernels is None or self.training or self.global_pool != "avg" or self._is_overridden():
            return None
        plan = self._plan
        if plan is None or not plan.is_current():
            self._plan = plan = Plan(self)
        if plan.arguments is None or plan.is_watched():
            return None
        check_images(x, self.in_chans, plan.arguments.weights[0])
        return kernels.network(x, *plan.arguments)

    def _is_overridden(self) -> bool:
        """Return whether a subclass, or this network alone, has other methods for the parts of `forward`."""
        methods = (self.forward_features, self.forward_head)
        own = (MobileMamba.forward_features, MobileMamba.forward_head)
        return tuple(getattr(method, "__func__", None) for method in methods) != own

    def fuse(self) -> MobileMamba:
        """Fold for inference, in place: batch norms, scales and residual depthwise convolutions into their neighbours.

        The output stays the same; the state dict does not, so load weights before. Puts the network into evaluation
        mode, the only useful one of a folded network.

        Returns:
            The network itself.
        """
        fuse(self)
        self._find_norms()
        return self


def _stage_of(feature: str) -> str:
    """Return the stage that a feature comes from: ``"patch_embed"`` for its layer ``"patch_embed.3"``."""
    return feature.partition(".")[0]


@torch.fx.wrap  # as torch.fx cannot follow what depends on sizes
def check_images(x: Tensor, in_chans: int, weight: Tensor) -> None:
    """Raise unless the input is (B, in_chans, H, W), large enough, and of the type of the weights.

    Raises:
        ValueError: If its shape is another.
        TypeError: If its type is another, and autocast does not convert it.
    """
    if x.dim() != 4 or x.shape[1] != in_chans or x.shape[2] < MIN_SIZE or x.shape[3] < MIN_SIZE:
        expected = f"(B, {in_chans}, H, W) with H and W of {MIN_SIZE} pixels or more"
        raise ValueError(f"input must be {expected}, got {tuple(x.shape)}")
    if not x.is_floating_point():
        raise TypeError(
            f"input must be {weight.dtype} and normalised, got {x.dtype}: of pixels, give (x / 255 - mean) / std"
        )
    if x.dtype != weight.dtype and type_under_autocast(x) is None:
        raise TypeError(
            f"input must be {weight.dtype} as the weights are, got {x.dtype}: convert it (x.to({weight.dtype})) or the "
            f"network (network.to({x.dtype}))"
        )
