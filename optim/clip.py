"""Clipping of gradients by norm, by value, or adaptively."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from timm.utils.agc import adaptive_clip_grad
from torch import Tensor

__all__ = ["CLIP_MODES", "clip_gradients"]

CLIP_MODES = ("norm", "value", "agc")


def clip_gradients(parameters: Iterable[Tensor], *, clip: float, mode: str = "norm") -> Tensor | None:
    """Clip the gradients in place.

    Args:
        parameters: Parameters; those without a gradient are passed over. Adaptive clipping is meant for all but the
            classifier's (Brock et al., arXiv 2102.06171).
        clip: Largest norm of all gradients together (``norm``), largest absolute entry (``value``), or largest ratio
            of a unit's gradient norm to its weight norm (``agc``).
        mode: ``norm``, ``value`` or ``agc``.

    Returns:
        The norm before clipping, a scalar, for ``norm``; otherwise None.

    Raises:
        ValueError: The mode is unknown or the limit is not above 0.
    """
    if mode not in CLIP_MODES:
        raise ValueError(f"loss.clip_mode must be one of {', '.join(CLIP_MODES)}, got {mode!r}")
    if not clip > 0:
        raise ValueError(f"loss.clip_grad must be above 0, or null for no clipping; got {clip}")
    if mode == "norm":
        return torch.nn.utils.clip_grad_norm_(parameters, clip)
    if mode == "value":
        torch.nn.utils.clip_grad_value_(parameters, clip)
    else:
        adaptive_clip_grad(parameters, clip)
    return None
