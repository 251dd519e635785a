"""How images are prepared for a network's test goes with its checkpoint, old or new."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image

from configs import load_config, to_dict
from data.transforms import build_transform
from model import create_model, from_pretrained, save_pretrained
from model.export import check, default_request
from model.preparation import describe_steps

DIGITS = (
    "size=64",
    "nb_classes=5",
    "data.test_transforms.0.crop_pct=1.0",
    "data.test_transforms.0.interpolation=bilinear",
)
HALVES = ("data.test_transforms.3.mean=[0.5,0.5,0.5]", "data.test_transforms.3.std=[0.25,0.25,0.25]")
TOLD = {"size": [64, 64], "crop_pct": 1.0, "interpolation": "bilinear", "mean": [0.5] * 3, "std": [0.25] * 3}


@pytest.fixture(scope="module")
def config():
    return load_config("configs/mobilemamba/mobilemamba_t2", [*DIGITS, *HALVES])


@pytest.fixture(scope="module")
def weights():
    return create_model("MobileMamba_T2", num_classes=5).state_dict()


def test_steps_of_a_run_in_a_few_words(config):
    assert describe_steps(to_dict(config)["data"]["test_transforms"]) == TOLD
    published = to_dict(load_config("configs/mobilemamba/mobilemamba_t2", []))["data"]["test_transforms"]
    told = describe_steps(published)
    assert (told["size"], told["crop_pct"], told["interpolation"]) == ([192, 192], 0.875, "bicubic")  # not 192 / 219
    assert describe_steps([{"type": "Resize", "size": 100}, {"type": "CenterCrop", "size": 80}])["crop_pct"] == 0.8


@pytest.mark.parametrize("place", ["entry", "inside", "beside"])
def test_a_checkpoint_brings_it_along(config, weights, tmp_path, place):
    entries = {"net": weights}
    if place == "entry":
        entries["test_transform"] = TOLD
    elif place == "inside":
        entries["config"] = to_dict(config)
    else:
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(to_dict(config)))
    torch.save(entries, tmp_path / "net.pth")
    network = create_model("MobileMamba_T2", num_classes=5, checkpoint_path=tmp_path / "net.pth")
    request = default_request(network)
    assert (request.size, request.crop_pct, request.interpolation) == ((64, 64), 1.0, "bilinear")
    assert (request.mean, request.std) == ((0.5,) * 3, (0.25,) * 3)
    saved = from_pretrained(save_pretrained(network, tmp_path / "saved"))
    assert tuple(timm.data.resolve_model_data_config(saved)["std"]) == (0.25,) * 3
    assert default_request(create_model("MobileMamba_T2")).std == (0.229, 0.224, 0.225)  # no other network's


def test_exporting_prepares_a_picture_as_the_test_does(config, weights, tmp_path):
    torch.save({"net": weights, "test_transform": TOLD}, tmp_path / "net.pth")
    network = create_model("MobileMamba_T2", num_classes=5, checkpoint_path=tmp_path / "net.pth")
    pixels = np.random.default_rng(0).integers(0, 256, (20, 20, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((150, 150)).save(tmp_path / "picture.png")
    (image,) = check.read_images(default_request(network), [tmp_path / "picture.png"], num_made_up=0)
    expected = build_transform(config.data.test_transforms)(Image.open(tmp_path / "picture.png"))
    torch.testing.assert_close(torch.from_numpy(image)[0], expected)


@pytest.mark.parametrize("text", ["data: {test_transforms: [3, {type: Resize, size: a}]}", "- a", "{", "data: {}"])
def test_a_file_of_that_name_may_be_something_else(weights, tmp_path, text):
    (tmp_path / "config.yaml").write_text(text)
    torch.save({"net": weights}, tmp_path / "net.pth")
    network = create_model("MobileMamba_T2", num_classes=5, checkpoint_path=tmp_path / "net.pth")
    assert default_request(network) == default_request(create_model("MobileMamba_T2", num_classes=5))


@pytest.mark.parametrize(
    "noted", [[1], {"std": [0.0]}, {"mean": "abc"}, {"size": [64]}, {"crop_pct": 2}, {"interpolation": "by hand"}]
)
def test_what_cannot_be_is_refused_before_the_weights_change(weights, tmp_path, noted):
    torch.save({"net": weights, "test_transform": noted}, tmp_path / "net.pth")
    with pytest.raises(ValueError, match=r"net\.pth: its test_transform .*remove the entry") as caught:
        create_model("MobileMamba_T2", num_classes=5, checkpoint_path=tmp_path / "net.pth")
    assert "\n" not in str(caught.value)
