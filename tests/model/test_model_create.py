"""`create_model`: names, arguments, released weights and heads."""

from __future__ import annotations

import sys

import pytest
import torch

from model import create_model


def test_timm_models_come_through_the_same_door():
    network = create_model("timm_resnet10t", num_classes=4)
    assert network(torch.randn(2, 3, 64, 64)).shape == (2, 4)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("MobileMamba_T3", "MobileMamba_T2"), ("timm_resnet49", "timm_resnet"), ("mobilmamba_b4", "MobileMamba_B4")],
)
def test_unknown_name_names_the_nearest(name, nearest):
    with pytest.raises(ValueError, match=nearest):
        create_model(name)


def test_fuse_is_refused_for_other_networks():
    with pytest.raises(ValueError, match="fuse"):
        create_model("timm_resnet10t", fuse=True)


def test_missing_released_weights_say_where_they_belong(weights_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "gdown", None)
    with pytest.raises(OSError, match=r"pip install gdown.*MobileMamba_B2/mobilemamba_b2\.pth"):
        create_model("MobileMamba_B2", pretrained=True)


@pytest.mark.parametrize(
    ("name", "pretrained", "message"),
    [
        ("MobileMamba_T2", "mobilemamba_t2x", "the nearest is 'mobilemamba_t2"),
        ("MobileMamba_T2", "mobilemamba_b1s", "use mobilemamba_t2 or mobilemamba_t2s"),
        ("MobileMamba_B1", "maskrcnn", "a detector or segmentor"),
        ("timm_resnet10t", "mobilemamba_t2", "takes True or False"),
    ],
)
def test_a_checkpoint_of_another_network_is_refused_by_name(name, pretrained, message):
    with pytest.raises(ValueError, match=message):
        create_model(name, pretrained=pretrained)


def test_unknown_argument_names_the_nearest():
    with pytest.raises(ValueError, match="'drop_path'"):
        create_model("MobileMamba_T2", droppath=0.1)


@pytest.mark.parametrize(("pretrained", "name"), [(True, "T2"), ("MobileMamba_T2s", "T2s")])
def test_released_weights_are_loaded_by_name_and_a_head_can_start_fresh(weights_folder, pretrained, name):
    released = create_model("MobileMamba_T2")
    (weights_folder / f"MobileMamba_{name}").mkdir()
    torch.save(released.state_dict(), weights_folder / f"MobileMamba_{name}" / f"mobilemamba_{name.lower()}.pth")

    loaded = create_model("mobilemamba_t2", pretrained=pretrained).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in released.state_dict().items())

    with pytest.raises(ValueError, match="num_classes"):
        create_model("mobilemamba_t2", pretrained=pretrained, num_classes=3)
    tuned = create_model("mobilemamba_t2", pretrained=pretrained, num_classes=3, reset_head=True).state_dict()
    assert tuned["head.l.weight"].shape == (3, 368)
    assert torch.equal(tuned["patch_embed.0.c.weight"], loaded["patch_embed.0.c.weight"])
