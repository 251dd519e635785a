"""A classifier's weights adapted to a network without a classifier, or for other input channels, as timm does."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from timm.models import adapt_input_conv
from torch import Tensor, nn

from .mismatch import head_modules

__all__ = ["adapt", "without_head"]

logger = logging.getLogger(__name__)


def adapt(
    weights: Mapping[str, Tensor], network: nn.Module, *, heads: Sequence[str], origin: str | Path
) -> dict[str, Tensor]:
    """Return a file's weights as a network takes them; each change is logged.

    The classifier's entries are left out for a network without one (``num_classes=0``). The stem's kernel follows the
    network's input channels: summed for one channel, repeated and scaled for others.

    Args:
        weights: The file's entries.
        network: The network.
        heads: Names of its classifiers.
        origin: The file, for messages.
    """
    own = network.state_dict()
    kept = without_head(weights, own, heads)
    if len(kept) < len(weights):
        logger.info("%s: left out the head, %d entries: the network has none", origin, len(weights) - len(kept))
    for entry in _other_stems(kept, network, own):
        channels, wanted = kept[entry].shape[1], own[entry].shape[1]
        kept[entry] = adapt_input_conv(wanted, kept[entry], base_chans=channels)
        logger.info("%s: adapted %s from %d to %d input channels", origin, entry, channels, wanted)
    return kept


def without_head(weights: Mapping[str, Tensor], own: Mapping[str, Tensor], heads: Sequence[str]) -> dict[str, Tensor]:
    """Return a file's weights, without what only a classifier has where the network has no classifier.

    Args:
        weights: The file's entries.
        own: The network's entries.
        heads: Names of the classifiers that such a network may have.
    """
    if any(f"{head}.weight" in own for head in heads):
        return dict(weights)
    modules = head_modules(heads)
    return {entry: value for entry, value in weights.items() if entry in own or not entry.startswith(modules)}


def _other_stems(weights: Mapping[str, Tensor], network: nn.Module, own: Mapping[str, Tensor]) -> list[str]:
    """Return the entries of the first convolutions that differ from the network's in their input channels only."""
    noted = getattr(network, "default_cfg", None) or {}
    stems = noted.get("first_conv") or ()
    entries = [f"{stem}.weight" for stem in ((stems,) if isinstance(stems, str) else stems)]
    found = []
    for entry in entries:
        if entry not in weights or entry not in own or not weights[entry].dim() == own[entry].dim() == 4:
            continue
        (width, channels, *window), (own_width, own_channels, *own_window) = weights[entry].shape, own[entry].shape
        # A stem that reads blocks of pixels as channels has their order to keep, and is left as it is.
        reads_image = own_channels == getattr(network, "in_chans", None) or channels == noted["input_size"][0]
        if channels != own_channels and reads_image and (width, window) == (own_width, own_window):
            found.append(entry)
    return found
