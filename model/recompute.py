"""Gradient checkpointing that updates batch statistics once, though the layers run twice."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

__all__ = ["recompute"]


def recompute(layer: nn.Module, x: Tensor) -> Tensor:
    """Run a layer and keep only its input for the backward pass, which runs the layer again.

    Its batch norms average every batch once, as without checkpointing.
    """
    return checkpoint(
        layer, x, use_reentrant=False, context_fn=lambda: (contextlib.nullcontext(), _frozen_statistics(layer))
    )


@contextlib.contextmanager
def _frozen_statistics(layer: nn.Module) -> Iterator[None]:
    """Keep the running statistics of all batch norms as they are, though they normalise by the batch."""
    before = [
        (norm, norm.momentum, norm.num_batches_tracked, norm.num_batches_tracked.clone())
        for norm in layer.modules()
        if isinstance(norm, _BatchNorm) and norm.num_batches_tracked is not None
    ]
    for norm, *_ in before:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum, count, old_count in before:
            norm.momentum = momentum
            count.copy_(old_count)
