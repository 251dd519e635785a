"""What is exported: a checkpoint of any layout, a saved folder, or a network by name."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
from torch import Tensor, nn

from ..checkpoint import load_checkpoint, network_prefixes, read_checkpoint, select_state_dict
from ..hub import from_pretrained
from ..mobilemamba import VARIANTS, MobileMamba, variant_shapes
from ..timm_models import note_origin

__all__ = ["Source", "bare_network", "read_source"]

logger = logging.getLogger(__name__)

_HEADS = ("head.l.weight", "head_dist.l.weight")
_STEM = "patch_embed.0.c.weight"


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """A network, and what its file tells besides.

    Attributes:
        network: With its weights.
        classes: Names of its classes, where they are known.
    """

    network: MobileMamba
    classes: Sequence[str] = field(default_factory=tuple)


def read_source(source: str, *, name: str = "", ema: bool = False, is_random: bool = False) -> Source:
    """Return the network that a user names.

    Args:
        source: A checkpoint of ours, a released one, any that `read_checkpoint` reads; a folder of `save_pretrained`;
            or a network by its name (``MobileMamba_T2``, ``mobilemamba_t2.dist_in1k``), with its released weights.
        name: The variant, where a checkpoint fits several.
        ema: Take the averaged weights, where the file holds both.
        is_random: Leave a network that is named without weights.

    Raises:
        FileNotFoundError: If it is neither a file, nor a folder, nor a name.
        ValueError: If the file holds no weights of MobileMamba.
    """
    path = Path(source)
    if path.is_dir():
        return Source(network=bare_network(from_pretrained(path)))
    known = [*VARIANTS, *(variant.lower() for variant in VARIANTS)]
    if not path.exists() and source.partition(".")[0] in known:
        return Source(network=bare_network(timm.create_model(source.lower(), pretrained=not is_random)))
    entries = read_checkpoint(path)
    weights, _ = select_state_dict(entries, ema=ema, origin=path, prefixes=network_prefixes())
    variant = name or _variant_of(weights, path)
    arguments = _arguments(weights)
    network = MobileMamba(**{**VARIANTS[variant], **arguments})
    note_origin(network, variant, arguments)
    load_checkpoint(network, path, checkpoint=entries, ema=ema, name=variant, variants=variant_shapes)
    return Source(network=network, classes=tuple(entries.get("class_names") or ()))


def bare_network(network: nn.Module) -> MobileMamba:
    """Return the MobileMamba in what timm or a user built.

    Raises:
        ValueError: If there is none.
    """
    inner = getattr(network, "model", network)  # timm's features_only
    if not isinstance(inner, MobileMamba):
        raise ValueError(
            f"a MobileMamba is exported, not a {type(network).__name__}: give the network or its checkpoint"
        )
    return inner


def _arguments(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return what the weights tell of a network beside its variant."""
    heads = [head for head in _HEADS if head in weights]
    arguments: dict[str, Any] = {"num_classes": len(weights[heads[0]]) if heads else 0}
    if len(heads) > 1:
        arguments["distillation"] = True
    if _STEM in weights:
        arguments["in_chans"] = weights[_STEM].shape[1]
    return arguments


def _variant_of(weights: Mapping[str, Tensor], path: Path) -> str:
    """Return the variant whose shapes the weights have; of those that are alike, the one that the file's name names."""
    shapes = {name: tuple(value.shape) for name, value in weights.items() if not name.startswith(("head", _STEM))}
    fitting = [
        variant
        for variant, own in variant_shapes().items()
        if shapes == {name: tuple(shape) for name, shape in own.items() if not name.startswith(("head", _STEM))}
    ]
    if not fitting:
        raise ValueError(f"{path} fits none of {', '.join(VARIANTS)}: build the network and call model.export.export")
    named = [variant for variant in fitting if variant.rpartition("_")[2].lower() in path.stem.lower().split("_")]
    chosen = (named or fitting)[0]
    if len(fitting) > 1 and not named:
        logger.info("%s fits %s: taking %s; --model names another", path, ", ".join(fitting), chosen)
    return chosen
