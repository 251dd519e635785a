"""Names and shapes of the variants' entries, without any weights."""

from __future__ import annotations

import torch

from .mobilemamba import VARIANTS, MobileMamba

__all__ = ["variant_shapes"]


def variant_shapes(num_classes: int = 1000) -> dict[str, dict[str, torch.Size]]:
    """Return the state-dict shapes of every variant, without allocating any weights."""
    with torch.device("meta"):
        networks = {name: MobileMamba(num_classes=num_classes, **settings) for name, settings in VARIANTS.items()}
    return {name: {key: value.shape for key, value in net.state_dict().items()} for name, net in networks.items()}
