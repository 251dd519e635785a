"""Class-activation maps: the published formula's, at the right place, of the right stage."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from trainer_cases import CONFIG

from configs import load_config
from model import create_model
from trainer.explain import Explainer, find_layer


class RedOrBlue(nn.Sequential):
    """Tells red from blue pictures: two channels that see one colour each, pooled."""

    feature_info = ({"module": "0", "num_chs": 2, "reduction": 1},)

    def __init__(self):
        super().__init__(nn.Conv2d(3, 2, 1, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        with torch.no_grad():
            self[0].weight.copy_(torch.tensor([[1.0, 0, 0], [0, 0, 1.0]])[..., None, None])


@pytest.fixture(autouse=True)
def _library():
    pytest.importorskip("pytorch_grad_cam")


def config(size=64):
    return load_config(CONFIG, ["data.root=x", f"size={size}", "predict.input=a"], mode="predict")


def test_the_map_lies_where_the_class_is_seen():
    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels[8:24, 40:56, 0] = 250
    pixels[40:56, 8:24, 2] = 250
    image = Image.fromarray(pixels)
    explainer = Explainer(RedOrBlue().eval(), config())
    explainer.transform = lambda image: torch.from_numpy(np.asarray(image) / 255).permute(2, 0, 1).float()
    for index, (top, left) in enumerate([(8, 40), (40, 8)]):
        activation = explainer.activation(explainer.prepare(image), index)
        expected = np.zeros((64, 64))
        expected[top : top + 16, left : left + 16] = 1
        assert activation == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("fuse", [False, True])
def test_the_map_is_grad_cams(parity_fill, fuse):
    """By its formula: channels weighed by their mean gradient, added up, without what speaks against the class."""
    network = parity_fill.fill_(create_model("MobileMamba_T2", num_classes=5)).eval()
    network = network.fuse() if fuse else network
    images = parity_fill.image(1, 192, 192, 0)
    explainer = Explainer(network, config(size=192))
    stage = network.forward_intermediates(images, indices=[2], intermediates_only=True)[0].requires_grad_()
    logits = network.forward_head(network.blocks3(stage))
    (gradient,) = torch.autograd.grad(logits[0, 3], stage)
    cam = (gradient.mean((2, 3), keepdim=True) * stage).sum(1, keepdim=True).relu()
    assert cam.shape[2:] == (6, 6)
    cam = (cam - cam.min()) / (cam.max() - cam.min())
    expected = F.interpolate(cam, size=(192, 192), mode="bilinear")[0, 0].detach().numpy()
    assert explainer.activation(images, 3) == pytest.approx(expected, abs=0.02)  # OpenCV interpolates in 64 steps
    assert not any(module._forward_hooks for module in network.modules())


def test_the_stage_is_the_deepest_that_tells_places_apart():
    network = create_model("MobileMamba_T2").eval()
    assert find_layer(network, 192) is network.blocks2[-1]
    assert find_layer(network, 512) is network.blocks3[-1]
    assert find_layer(network, 64) is network.patch_embed[-1]
    with pytest.raises(ValueError, match="names its stages; Flatten does not"):
        find_layer(nn.Flatten(), 64)


def test_colours_are_those_of_the_picture():
    """The normalisation is taken back; where nothing is seen, the overlay is the picture below the map's dark blue."""
    explainer = Explainer(RedOrBlue().eval(), config())
    colour = (120, 60, 200)
    prepared = explainer.prepare(Image.new("RGB", (80, 64), colour))
    assert prepared.shape == (1, 3, 64, 64)
    assert 255 * explainer._pixels(prepared[0]) == pytest.approx(np.broadcast_to(colour, (64, 64, 3)), abs=0.6)


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="needs pytorch-grad-cam: pip install grad-cam"):
        Explainer(RedOrBlue(), config())
