"""The variants as models of timm: ``timm.create_model("mobilemamba_b1", ...)`` once this package is imported.

A released checkpoint is named by its tag: ``mobilemamba_b1.in1k``, the default, was trained from the labels alone,
``mobilemamba_b1.dist_in1k`` with a teacher as well († in the tables). timm adapts weights to another number of classes
or of input channels as it does for its own models.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model, resolve_pretrained_cfg
from torch import Tensor, nn

from .adapt import without_head
from .checkpoint import HEADS, network_prefixes, select_state_dict
from .mobilemamba import VARIANTS, MobileMamba
from .zoo import Entry, fetch, read_zoo

__all__ = [
    "mobilemamba_b1",
    "mobilemamba_b2",
    "mobilemamba_b4",
    "mobilemamba_s6",
    "mobilemamba_t2",
    "mobilemamba_t4",
    "note_origin",
]

TAGS = {"": "in1k", "s": "dist_in1k"}  # by what follows the variant in the name of a checkpoint
STRIDE = 64
MIN_SIZE = 32


def _address(entry: Entry) -> str:
    """Return what tells timm that there are weights, and us which: `fetch` gets and verifies them."""
    return entry.url or f"https://drive.google.com/file/d/{entry.drive_id}/view"


def _cfg(entry: Entry) -> dict[str, Any]:
    size = VARIANTS[entry.network]["img_size"]
    return {
        "url": _address(entry),
        "num_classes": entry.dataset.num_classes,
        "input_size": (3, size, size),
        "min_input_size": (3, MIN_SIZE, MIN_SIZE),
        "pool_size": (math.ceil(size / STRIDE),) * 2,
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.0.c",
        "classifier": HEADS[0],
        "license": "mit",
        "paper_ids": "arXiv:2411.15941",
        "paper_name": "MobileMamba: Lightweight Multi-Receptive Visual Mamba Network",
    }


_CLASSIFIERS = [entry for entry in read_zoo().values() if entry.task == "imagenet"]
_RELEASED = {_address(entry): entry for entry in _CLASSIFIERS}


def _tagged(entry: Entry) -> str:
    variant = entry.network.lower()
    return f"{variant}.{TAGS[entry.name.removeprefix(variant)]}"


default_cfgs = generate_default_cfgs({_tagged(entry): _cfg(entry) for entry in _CLASSIFIERS})


def note_origin(network: MobileMamba, variant: str, arguments: Mapping[str, Any]) -> None:
    """Note on a network what it was built from, as timm does, and as saving it needs.

    Args:
        network: The network.
        variant: Its variant.
        arguments: What it was given beside the variant's own arguments.
    """
    if not network.default_cfg:
        network.default_cfg = resolve_pretrained_cfg(variant.lower()).to_dict()
        network.pretrained_cfg = network.default_cfg
    if network.distillation:
        network.default_cfg["classifier"] = HEADS
    known = inspect.signature(MobileMamba).parameters
    network.model_args = {name: value for name, value in arguments.items() if name in known}


def _filter(checkpoint: Mapping[str, Any], network: MobileMamba) -> dict[str, Tensor]:
    """Return the weights in a checkpoint of any layout, without a head where the network has none."""
    own = network.state_dict()
    weights, _ = select_state_dict(checkpoint, ema=False, prefixes=network_prefixes(own))
    return without_head(weights, own, HEADS)


def _create(
    variant: str,
    pretrained: bool,
    *,
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: Mapping[str, Any] | None = None,
    cache_dir: Any = None,
    drop_path_rate: float | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Build a variant as timm does. Released weights come by way of the zoo, others from where the cfg says."""
    name = variant.lower()
    if kwargs.pop("output_stride", 32) != 32:
        raise ValueError(f"{name} cannot dilate its convolutions to another output_stride: leave it out")
    overlay = dict(pretrained_cfg_overlay or {})
    cfg = resolve_pretrained_cfg(name, pretrained_cfg=pretrained_cfg, pretrained_cfg_overlay=overlay)
    is_elsewhere = cfg.file or cfg.hf_hub_id or cfg.state_dict
    if pretrained and not is_elsewhere and cfg.url in _RELEASED:
        overlay["file"] = str(fetch(_RELEASED[cfg.url]))
    if kwargs.get("features_only"):
        kwargs.setdefault("stem_features", True)  # level i at stride 2^(i + 1), as timm's convolutional networks have
    if drop_path_rate is not None:
        kwargs["drop_path"] = drop_path_rate
    network = build_model_with_cfg(
        MobileMamba,
        name,
        pretrained,
        pretrained_cfg=pretrained_cfg,
        pretrained_cfg_overlay=overlay,
        pretrained_filter_fn=_filter,
        feature_cfg={
            "out_indices": tuple(range(6)) if kwargs.get("stem_features") else (1, 2, 3),
            "feature_cls": "getter",
        },
        cache_dir=cache_dir,
        **{**VARIANTS[variant], **kwargs},
    )
    if isinstance(network, MobileMamba):
        note_origin(network, variant, kwargs)
    if pretrained:
        # transformers' TimmBackbone would begin batch norms' statistics anew, as it has not loaded them itself.
        for module in network.modules():
            module._is_hf_initialized = True  # type: ignore[assignment]
    return network


@register_model
def mobilemamba_t2(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """MobileMamba-T2: 8.8 M parameters, at 192 pixels."""
    return _create("MobileMamba_T2", pretrained, **kwargs)


@register_model
def mobilemamba_t4(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """MobileMamba-T4: 14.2 M parameters, at 192 pixels."""
    return _create("MobileMamba_T4", pretrained, **kwargs)


@register_model
def mobilemamba_s6(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """MobileMamba-S6: 15.0 M parameters, at 224 pixels."""
    return _create("MobileMamba_S6", pretrained, **kwargs)


@register_model
def mobilemamba_b1(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """MobileMamba-B1: 17.1 M parameters, at 256 pixels."""
    return _create("MobileMamba_B1", pretrained, **kwargs)


@register_model
def mobilemamba_b2(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """MobileMamba-B2: B1's network, at 384 pixels."""
    return _create("MobileMamba_B2", pretrained, **kwargs)


@register_model
def mobilemamba_b4(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """MobileMamba-B4: B1's network, at 512 pixels."""
    return _create("MobileMamba_B4", pretrained, **kwargs)
