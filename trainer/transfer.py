"""The way of a batch to the device."""

from __future__ import annotations

import torch
from torch import Tensor

from data import Batch

__all__ = ["Transfer"]


class Transfer:
    """Copies batches to the device; to a GPU on a stream of its own, beside the step before, which it still computes.

    Args:
        device: Where batches go.
        memory_format: Memory format of the images there.
    """

    def __init__(self, device: torch.device, memory_format: torch.memory_format) -> None:
        self._device = device
        self._memory_format = memory_format
        self._copies: torch.cuda.Stream | None = None  # made for the first batch

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return images (B, C, H, W) and targets (B,), which the current stream may use at once."""
        if self._device.type != "cuda":
            return self._copy(batch)
        if self._copies is None:
            self._copies = torch.cuda.Stream(self._device)
        with torch.cuda.stream(self._copies):
            copied = self._copy(batch)
        current = torch.cuda.current_stream(self._device)
        current.wait_stream(self._copies)
        for tensor in copied:
            tensor.record_stream(current)  # or the next copy could get its memory while the step reads it
        return copied

    def _copy(self, batch: Batch) -> tuple[Tensor, Tensor]:
        images = batch.images.to(self._device, non_blocking=True, memory_format=self._memory_format)
        return images, batch.targets.to(self._device, non_blocking=True)
