"""Inputs for single layers, and networks with weights that show something."""

from __future__ import annotations

import torch
from torch import nn


def feature_map(batch, height, width, channels, *, extra=0):
    """Random features; with ``extra``, a slice of the channels of a larger map."""
    whole = torch.randn(batch, channels + extra, height, width).contiguous(memory_format=torch.channels_last)
    return whole[:, :channels]


def lively(network):
    """Give every BN random statistics and weights, so that no branch is silent and no fold trivial."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return network
