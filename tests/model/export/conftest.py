"""Small networks to export, with weights that show something."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from model import MobileMamba
from model.export import check


@pytest.fixture(autouse=True)
def short_measurements(monkeypatch):
    monkeypatch.setattr(check, "MEASURED_SECONDS", 0.02)


@pytest.fixture
def small(parity_fill):
    """Return a function that builds a small network of three stages, each with a scan."""

    def build(**kwargs):
        settings = {"num_classes": 7, "embed_dim": (40, 48, 64), "depth": (1, 1, 1), "img_size": 64}
        network = parity_fill.fill_(MobileMamba(**{**settings, **kwargs})).eval()
        torch.manual_seed(0)
        for name, parameter in network.named_parameters():
            if name.endswith(("A_logs", "Ds")):  # a decay for each channel, and a direction's own skip
                nn.init.uniform_(parameter.data, -1.5, 1.5)
        return network

    return build


@pytest.fixture
def relative_error():
    """Return the largest difference as a share of the largest value."""

    def compare(actual, expected):
        actual, expected = (torch.as_tensor(value).double() for value in (actual, expected))
        return ((actual - expected).abs().max() / expected.abs().max()).item()

    return compare
