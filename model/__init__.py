"""The door to every network: `create_model(name, **kwargs)`."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
from torch import nn

from . import twin  # first: it decides whose operators all that follows takes
from .checkpoint import load_checkpoint
from .hub import from_pretrained, save_pretrained
from .lib_mamba import SS2D, gated_scan, selective_scan, set_backend, use_backend
from .lib_teacher import TEACHERS, create_teacher
from .mobilemamba import VARIANTS, MobileMamba, fuse, variant_shapes
from .timm_models import note_origin
from .version import __version__
from .zoo import fetch, released_entry

__all__ = [
    "SS2D",
    "MobileMamba",
    "__version__",
    "create_model",
    "from_pretrained",
    "fuse",
    "gated_scan",
    "list_models",
    "load_checkpoint",
    "save_pretrained",
    "selective_scan",
    "set_backend",
    "twin",
    "use_backend",
    "variant_shapes",
]

TIMM_PREFIX = "timm_"


def list_models() -> list[str]:
    """Return the names of the MobileMamba variants."""
    return list(VARIANTS)


def create_model(
    name: str,
    *,
    pretrained: bool | str = False,
    checkpoint_path: str | Path = "",
    checkpoint: Mapping[str, Any] | None = None,
    ema: bool = False,
    strict: bool = True,
    reset_head: bool = False,
    fuse: bool = False,
    scan_backend: str = "",
    **kwargs: Any,
) -> nn.Module:
    """Build a network by name and load its weights.

    Args:
        name: A variant (`list_models`, upper or lower case), ``timm_<name>`` for any timm model, or a teacher.
        pretrained: Load the variant's released checkpoint, or, by a name such as ``"mobilemamba_t2s"``, the distilled
            one; it is downloaded once and verified. For a timm model, load timm's own.
        checkpoint_path: Checkpoint to load instead.
        checkpoint: The entries of that file, as `model.checkpoint.read_checkpoint` returns them, where it has been read
            already.
        ema: Take the averaged weights (``net_E``) from it.
        strict: Refuse a checkpoint whose entries are not exactly the network's.
        reset_head: Leave a head of another class count, or that the file lacks, freshly initialised rather than refuse
            the file, for fine-tuning.
        fuse: Fold for inference after loading; see `MobileMamba.fuse`.
        scan_backend: Force what runs the scans, in the whole process: "reference", "cpu", "cuda" or "triton". Left
            empty, the choice stays as it is: the fastest that is available, unless one was forced before.
        **kwargs: Arguments of the network: ``num_classes``, ``in_chans``, ``distillation``, ``drop_path``, ...

    Raises:
        ValueError: If the name or an argument is unknown, the checkpoint does not fit, or ``fuse`` is asked of a
            network that cannot, or the scan backend cannot run here.
        FileNotFoundError: If the checkpoint does not exist.
        OSError: If a released checkpoint cannot be downloaded.
    """
    if scan_backend:
        set_backend(scan_backend)
    is_ours = not name.startswith(TIMM_PREFIX) and name.lower() not in TEACHERS
    if isinstance(pretrained, str) and not is_ours:
        raise ValueError(f"pretrained={pretrained!r} names a checkpoint of MobileMamba; {name} takes True or False")
    if name.lower() in TEACHERS:
        loading: dict[str, Any] = {
            "pretrained": pretrained,
            "checkpoint_path": str(checkpoint_path),
            "checkpoint": checkpoint,
            "ema": ema,
            "strict": strict,
        }
        return create_teacher(name, **loading, **kwargs)
    network = _build(name, pretrained, kwargs)
    if pretrained and not checkpoint_path and is_ours:
        checkpoint_path = fetch(released_entry(name, pretrained))
    if checkpoint_path:
        load_checkpoint(
            network,
            checkpoint_path,
            checkpoint=checkpoint,
            ema=ema,
            strict=strict,
            reset_head=reset_head,
            name=name,
            variants=variant_shapes,
        )
    if fuse:
        if not isinstance(network, MobileMamba):
            raise ValueError(f"fuse is for MobileMamba networks, not for {name}")
        network.fuse()
    return network


def _build(name: str, pretrained: bool | str, kwargs: dict[str, Any]) -> nn.Module:
    if name.startswith(TIMM_PREFIX):
        return _build_timm(name.removeprefix(TIMM_PREFIX), bool(pretrained), kwargs)
    known = {variant.lower(): variant for variant in VARIANTS}
    if name.lower() not in known:
        near = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.0)
        raise ValueError(
            f"no model {name!r}, the nearest is {known[near[0]]}; known: {', '.join(VARIANTS)}, "
            f"{', '.join(TEACHERS)}, and {TIMM_PREFIX}<name> for any timm model"
        )
    known_arguments = inspect.signature(MobileMamba).parameters
    for argument in kwargs:
        if argument not in known_arguments:
            near = difflib.get_close_matches(argument, known_arguments, n=1, cutoff=0.0)
            raise ValueError(f"{name} has no argument {argument!r}; did you mean {near[0]!r}?")
    variant = known[name.lower()]
    network = MobileMamba(**{**VARIANTS[variant], **kwargs})
    note_origin(network, variant, kwargs)
    return network


def _build_timm(name: str, pretrained: bool, kwargs: dict[str, Any]) -> nn.Module:
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=1, cutoff=0.0)
        raise ValueError(f"timm {timm.__version__} has no model {name!r}; the nearest is {TIMM_PREFIX}{near[0]}")
    return timm.create_model(name, pretrained=pretrained, **kwargs)
