"""Multiply-accumulate operations of every variant against the published ones."""

from __future__ import annotations

import pytest

from model import create_model, list_models
from model.profile import count_macs

PUBLISHED_MACS = {"T2": 255e6, "T4": 413e6, "S6": 652e6, "B1": 1080e6, "B2": 2427e6, "B4": 4313e6}
SIZES = {"T2": 192, "T4": 192, "S6": 224, "B1": 256, "B2": 384, "B4": 512}


@pytest.mark.parametrize("variant", PUBLISHED_MACS)
def test_macs_are_within_two_percent_of_the_published(variant):
    assert list_models() == [f"MobileMamba_{name}" for name in SIZES]
    network = create_model(f"MobileMamba_{variant}")
    assert count_macs(network, SIZES[variant]) == pytest.approx(PUBLISHED_MACS[variant], rel=0.02)
