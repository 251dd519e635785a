"""The literal network computes what ours computes, or the comparison would mean nothing."""

from __future__ import annotations

import pytest
import torch

from benchmarks.literal import create_literal, literal_core
from benchmarks.networks import settle
from benchmarks.scan import Call, core_arguments, literal_arguments
from model import create_model
from model.lib_mamba import gated_scan


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).abs().max() / expected.abs().max()).item()


@pytest.fixture(scope="module")
def pair():
    torch.manual_seed(0)
    ours = settle(create_model("MobileMamba_T2", num_classes=10))
    literal = create_literal("MobileMamba_T2")
    literal.reset_classifier(10)
    literal.load_state_dict(ours.state_dict())
    return ours, literal.eval()


@pytest.mark.parametrize("length", [1, 3, 36, 49])
def test_core_is_the_operator(length):
    arguments = core_arguments(Call(channels=33, length=length, rank=3), 2, torch.float32, "cpu")
    y = literal_core(*literal_arguments(arguments)).squeeze(2).transpose(1, 2)
    assert relative(y, gated_scan(*arguments)) < 1e-5


@pytest.mark.parametrize("size", [(64, 64), (80, 112)], ids=str)
def test_logits_agree(pair, size):
    ours, literal = pair
    images = torch.randn(2, 3, *size)
    with torch.inference_mode():
        assert relative(literal(images), ours(images)) < 1e-5


def test_gradients_agree(pair):
    images = torch.randn(2, 3, 128, 128)
    gradients = []
    for network in pair:
        network.zero_grad()
        network(images).square().sum().backward()
        gradients.append({name: p.grad for name, p in network.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, expected in gradients[0].items():
        assert relative(gradients[1][name], expected) < 1e-3, name


def test_fused_logits_agree():
    torch.manual_seed(0)
    literal = settle(create_literal("MobileMamba_T2"))
    images = torch.randn(1, 3, 96, 96)
    with torch.inference_mode():
        expected = literal(images)
        fused = literal.fuse()
        assert not [m for m in fused.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
        assert relative(fused(images), expected) < 1e-5
