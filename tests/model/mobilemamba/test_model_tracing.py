"""Tracers follow the network: torch.fx, torchvision's feature extraction, torch.jit."""

from __future__ import annotations

import pytest
import torch
from layer_cases import lively
from torchvision.models.feature_extraction import create_feature_extractor

from model import create_model
from model.lib_mamba import backends


def settled(is_folded, **arguments):
    torch.manual_seed(0)
    network = lively(create_model("MobileMamba_T2", num_classes=5, **arguments)).eval()
    return network.fuse() if is_folded else network


@pytest.mark.parametrize("is_folded", [False, True])
@pytest.mark.parametrize("scan", ["bidirectional", "cross"])
def test_symbolic_trace_serves_any_size(is_folded, scan):
    network = settled(is_folded, scan=scan)
    traced = torch.fx.symbolic_trace(network)
    with torch.no_grad():
        for shape in ((2, 3, 64, 96), (1, 3, 97, 33)):
            images = torch.randn(shape)
            torch.testing.assert_close(traced(images), network(images), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="32 pixels or more"):
        traced(torch.randn(1, 3, 16, 64))


def test_symbolic_trace_of_a_network_in_training_has_its_gradients():
    network = settled(False, drop_path=0.1).double().train()
    images = torch.randn(4, 3, 64, 64, dtype=torch.float64)
    gradients = []
    for run in (network, torch.fx.symbolic_trace(network)):
        network.zero_grad()
        torch.manual_seed(1)  # for the blocks that are left out
        run(images).square().sum().backward()
        gradients.append({name: value.grad for name, value in network.named_parameters() if value.requires_grad})
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, rtol=1e-6, atol=1e-9, msg=name)


@pytest.mark.parametrize("is_folded", [False, True])
def test_torchvision_extracts_features(is_folded):
    network = settled(is_folded)
    extractor = create_feature_extractor(network, {"patch_embed": "stem", "blocks2": "middle", "blocks3": "last"})
    images = torch.randn(1, 3, 70, 100)
    with torch.no_grad():
        maps = extractor.eval()(images)
        expected = network.forward_intermediates(images, (0, 2, 3), intermediates_only=True)
    assert list(maps) == ["stem", "middle", "last"]
    for actual, wanted in zip(maps.values(), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("is_folded", [False, True])
def test_jit_trace_may_be_the_first_use_in_a_process_with_gradients_on(is_folded):
    network = settled(is_folded)
    backends._choose.cache_clear()
    backends.availability.cache_clear()
    images = torch.randn(2, 3, 64, 64)
    traced = torch.jit.trace(network, images)
    assert torch.equal(traced(images), network(images))


@pytest.mark.parametrize("is_folded", [False, True])
def test_images_of_another_type_are_refused_with_the_way_out(is_folded):
    network = settled(is_folded)
    images = torch.rand(2, 3, 64, 64)
    with pytest.raises(TypeError, match=r"float32 and normalised, got torch\.uint8: .*\(x / 255 - mean\) / std"):
        network((255 * images).byte())
    with pytest.raises(TypeError, match=r"float64: convert it \(x\.to\(torch\.float32\)\) or the network"):
        network(images.double())
    with pytest.raises(TypeError, match=r"got torch\.bfloat16: convert it"):
        network(images.bfloat16())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert network(images.bfloat16()).isfinite().all()
        with pytest.raises(TypeError, match="float64"):
            network(images.double())
    assert network.double()(images.double()).dtype == torch.float64
