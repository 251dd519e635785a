"""Clipping of gradients by norm, by value, or adaptively."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from timm.utils.agc import adaptive_clip_grad
from torch import Tensor

__all__ = ["clip_gradients"]


def clip_gradients(parameters: Iterable[Tensor], *, clip: float, mode: str = "norm") -> Tensor | None:
    """Clip the gradients in place.

    Args:
        parameters: Parameters; those without a gradient are passed over. Adaptive clipping is meant for all but the
            classifier's (Brock et al., arXiv 2102.06171).
        clip: Largest norm of all gradients together (``norm``), largest absolute entry (``value``), or largest ratio of
            a unit's gradient norm to its weight norm (``agc``); above 0.
        mode: ``norm``, ``value`` or ``agc``.

    Returns:
        The norm before clipping, a scalar, for ``norm``; otherwise None.
    """
    if mode == "norm":
        return torch.nn.utils.clip_grad_norm_(parameters, clip)
    if mode == "value":
        torch.nn.utils.clip_grad_value_(parameters, clip)
    else:
        adaptive_clip_grad(parameters, clip)
    return None
