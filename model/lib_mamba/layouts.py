"""Weights in the layouts that the compiled CPU kernels read, which csrc/layers defines: Python only asks for them.

Each function returns None for a weight that no kernel reads: on another device, or without the library.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import library

__all__ = ["bands", "columns", "depthwise"]


def columns(weight: Tensor) -> Tensor | None:
    """Return the matrix (K, N) of a product, its columns padded and cut into panels: (K * N',)."""
    return _pack("pack_columns", weight)


def depthwise(weight: Tensor) -> Tensor | None:
    """Return a depthwise weight (C, 1, H, W) as (H, W, C)."""
    return _pack("pack_depthwise", weight)


def bands(weight: Tensor) -> Tensor | None:
    """Return the depthwise weight of the Haar bands (4C, 1, H, W) as (H, W, 4C), one band after the other."""
    return _pack("pack_bands", weight)


def _pack(operator: str, weight: Tensor) -> Tensor | None:
    if not weight.is_cpu or not library.load()[0]:
        return None
    return getattr(torch.ops.mobilemamba_kernels, operator)(weight.detach())
