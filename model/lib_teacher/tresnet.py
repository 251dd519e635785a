"""TResNet-L v2, the teacher of the † recipes, as timm builds it.

The published weights (`tresnet_l_v2_83_9.pth`, 83.9% top-1 on ImageNet-1K) come from the code of "Solving ImageNet"
(arXiv 2204.03475). That network's normalisation is in-place ABN, which scales by ``|weight| + eps``, and its entries
are numbered (``conv1.0.weight``). timm's own filter renames them and takes the absolute value.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
from timm.models.tresnet import checkpoint_filter_fn
from torch import nn

from ..checkpoint import network_prefixes, read_checkpoint, select_state_dict
from ..mismatch import compare, explain

__all__ = ["TEACHERS", "create_teacher"]

logger = logging.getLogger(__name__)

TEACHERS = {"tresnet_l_v2": "tresnet_v2_l"}  # our name of a teacher -> timm's
NUM_CLASSES = 1000  # of the weights that timm fetches
BATCH_COUNT = ".num_batches_tracked"


def create_teacher(
    name: str,
    *,
    num_classes: int = NUM_CLASSES,
    in_chans: int = 3,
    pretrained: bool = False,
    checkpoint_path: str = "",
    checkpoint: Mapping[str, Any] | None = None,
    ema: bool = False,
    strict: bool = True,
    **kwargs: Any,
) -> nn.Module:
    """Build a teacher and load its weights.

    A checkpoint file that is there goes before timm's weights; where neither is asked for, the weights are random.

    Args:
        name: A name of ``TEACHERS``, in any case.
        num_classes: Size of the classifier.
        in_chans: Channels of the input image.
        pretrained: Fetch timm's ImageNet-1K weights.
        checkpoint_path: File with the published weights, in the original's naming or in timm's.
        checkpoint: The entries of that file, where it has been read already.
        ema: Take the averaged weights, where the file holds both.
        strict: Refuse missing and unexpected entries.
        **kwargs: Further arguments of timm's network.

    Raises:
        ValueError: The name is unknown, the file is missing, cannot be read or does not fit, or timm's weights cannot
            be fetched or are for another number of classes.
    """
    if name.lower() not in TEACHERS:
        raise ValueError(f"no teacher named {name!r}; known: {', '.join(TEACHERS)}")
    timm_name = TEACHERS[name.lower()]
    has_file = bool(checkpoint_path) and Path(checkpoint_path).is_file()
    if checkpoint_path and not has_file and not pretrained:
        raise ValueError(
            f"teacher {name}: there is no checkpoint {checkpoint_path}. Put the published file there, or fetch timm's "
            f"weights of `{timm_name}` with model_kwargs.pretrained=true in the loss term's cfg (in the recipes "
            "loss.loss_terms.KD.cfg.model_kwargs.pretrained=true)"
        )
    fetch = pretrained and not has_file
    if fetch and num_classes != NUM_CLASSES:
        raise ValueError(
            f"teacher {name}: timm's weights are for {NUM_CLASSES} classes, and a head for {num_classes} would be "
            "random; name a checkpoint of your own in model_kwargs.checkpoint_path of the loss term's cfg"
        )
    network = _build(timm_name, pretrained=fetch, num_classes=num_classes, in_chans=in_chans, **kwargs)
    if has_file:
        _load(network, checkpoint_path, checkpoint, ema=ema, strict=strict)
    elif fetch:
        logger.info("teacher %s: timm's weights of %s", name, timm_name)
    return network


def _build(timm_name: str, *, pretrained: bool, **kwargs: Any) -> nn.Module:
    """Build timm's network; a failed download becomes a ValueError that says what to do."""
    if not pretrained:
        return timm.create_model(timm_name, **kwargs)
    try:
        return timm.create_model(timm_name, pretrained=True, **kwargs)
    except Exception as error:  # the download libraries share no base class of errors
        cause = str(error).partition("\n")[0]
        raise ValueError(
            f"timm's weights of `{timm_name}` could not be fetched ({type(error).__name__}: {cause}). Put a checkpoint "
            "on this machine and name it in model_kwargs.checkpoint_path of the loss term's cfg"
        ) from error


def _load(network: nn.Module, path: str, checkpoint: Mapping[str, Any] | None, *, ema: bool, strict: bool) -> None:
    """Load a checkpoint in the original's naming or in timm's."""
    own = network.state_dict()
    contents = read_checkpoint(path) if checkpoint is None else checkpoint
    entries, source = select_state_dict(contents, ema=ema, origin=path, prefixes=network_prefixes(own))
    entries = checkpoint_filter_fn(entries, network)
    # In-place ABN counts no batches, and nothing in eval mode reads the count.
    counted = {name: value for name, value in own.items() if name not in entries and name.endswith(BATCH_COUNT)}
    report = compare(entries | counted, own, source=source)
    if not report.fits:
        lines = [f"{path} ({source}) does not fit the teacher.", *explain(report, entries, own, heads=())]
        if strict:
            raise ValueError("\n  ".join(lines))
        logger.warning("\n  ".join(lines))
    fitting = {name: value for name, value in entries.items() if name in own and name not in report.mismatched}
    network.load_state_dict(fitting, strict=False)
    logger.info("%s: loaded %d entries of %s into the teacher", path, len(fitting), source)
