"""Gradient checkpointing that leaves batch statistics alone: layers run again in the backward pass count once."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

__all__ = ["recompute"]


def recompute(layer: nn.Module, x: Tensor) -> Tensor:
    """Run a layer and keep its input alone for the backward pass, which runs the layer again.

    Its batch norms average every batch once, as without checkpointing.
    """
    return checkpoint(
        layer, x, use_reentrant=False, context_fn=lambda: (contextlib.nullcontext(), _frozen_statistics(layer))
    )


@contextlib.contextmanager
def _frozen_statistics(layer: nn.Module) -> Iterator[None]:
    """Keep the running statistics of all batch norms as they are, though they normalise by the batch."""
    norms = [norm for norm in layer.modules() if isinstance(norm, _BatchNorm) and norm.track_running_stats]
    before = [(norm.momentum, norm.get_buffer("num_batches_tracked").clone()) for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before, strict=True):
            norm.momentum = momentum
            norm.get_buffer("num_batches_tracked").copy_(count)
