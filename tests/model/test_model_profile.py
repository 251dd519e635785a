"""Multiply-accumulate operations of every variant against the published ones."""

from __future__ import annotations

import pytest

from model import create_model
from model.mobilemamba import VARIANTS
from model.profile import count_macs


@pytest.mark.parametrize("name", VARIANTS)
def test_macs_are_within_two_percent_of_the_published(name, parity_json):
    published = parity_json("published.json")["imagenet"][name.lower()]
    expected = float(published["flops"].removesuffix("M")) * 1e6  # MACs, called FLOPs there
    assert count_macs(create_model(name), published["size"]) == pytest.approx(expected, rel=0.02)
