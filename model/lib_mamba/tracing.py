"""What looks at a network instead of running it."""

from __future__ import annotations

import torch

__all__ = ["is_exporting"]


@torch.compiler.assume_constant_result
def is_exporting() -> bool:
    """Return whether torch.export is at work.

    torch.compile reads PyTorch's own function as true, of itself too: it must call it instead.
    """
    return torch.compiler.is_exporting()
