"""Inputs for single layers."""

from __future__ import annotations

import torch


def feature_map(batch, height, width, channels, *, extra=0):
    """Random features; with ``extra``, a slice of the channels of a larger map."""
    whole = torch.randn(batch, channels + extra, height, width).contiguous(memory_format=torch.channels_last)
    return whole[:, :channels]
