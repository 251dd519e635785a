"""Folders of `save_pretrained` in Hugging Face's transformers, without a connection."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from benchmarks.networks import settle
from model import create_model, from_pretrained, save_pretrained

transformers = pytest.importorskip("transformers")

CLASSES = ["ant", "bee", "cat", "dog"]


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return settle(create_model("MobileMamba_T2", num_classes=4))


@pytest.fixture(scope="module")
def folder(network, tmp_path_factory):
    return str(save_pretrained(network, tmp_path_factory.mktemp("transformers") / "mine", classes=CLASSES))


def test_logits_are_the_same_bit_for_bit(network, folder):
    loaded = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
    images = torch.randn(2, 3, 96, 128)
    with torch.no_grad():
        assert torch.equal(loaded(images).logits, network(images))
    assert loaded.config.id2label == dict(enumerate(CLASSES))


def test_what_is_trained_is_the_same(network, folder):
    loaded = transformers.AutoModelForImageClassification.from_pretrained(folder)
    trained = {name for name, value in loaded.timm_model.named_parameters() if value.requires_grad}
    assert trained == {name for name, value in network.named_parameters() if value.requires_grad}
    loss = loaded(torch.randn(2, 3, 64, 64), labels=torch.tensor([1, 3])).loss
    loss.backward()
    assert all(dict(loaded.timm_model.named_parameters())[name].grad is not None for name in trained)


def test_pipeline_predicts_from_a_picture(network, folder):
    picture = Image.radial_gradient("L").convert("RGB").resize((300, 240))
    predicted = transformers.pipeline("image-classification", folder)(picture, top_k=4)
    pixels = transformers.AutoImageProcessor.from_pretrained(folder)(picture)["pixel_values"]
    with torch.no_grad():
        expected = network(pixels)[0].softmax(0)
    assert {entry["label"]: pytest.approx(entry["score"], abs=1e-6) for entry in predicted} == dict(
        zip(CLASSES, expected.tolist(), strict=True)
    )


def test_pictures_are_resized_cropped_and_normalised_as_in_a_test(folder):
    picture = Image.new("RGB", (400, 219), (255, 255, 255))
    picture.paste((0, 0, 0), (0, 0, 100, 219))  # outside of the crop: the middle 192 of 400 columns
    pixels = transformers.AutoImageProcessor.from_pretrained(folder)(picture)["pixel_values"]
    assert pixels.shape == (1, 3, 192, 192)
    white = [(1 - mean) / std for mean, std in zip((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), strict=True)]
    torch.testing.assert_close(pixels, torch.tensor(white).view(1, 3, 1, 1).expand_as(pixels), rtol=1e-4, atol=1e-4)


def test_as_a_backbone(network, folder):
    images = torch.randn(1, 3, 96, 128)
    backbone = transformers.AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        output = backbone(images, output_hidden_states=[1, 2, 3])
        last, expected = network.forward_intermediates(images, (1, 2, 3))
        pooled = network.forward_head(last, pre_logits=True)
    assert [x.shape[1] for x in output.hidden_states] == [144, 272, 368]
    for own, theirs in zip([*expected, last, pooled], [*output.hidden_states, *output[:2]], strict=True):
        assert torch.equal(own, theirs)


@pytest.mark.parametrize("door", ["TimmBackbone", "AutoBackbone"])
def test_as_a_backbone_of_detectors(network, folder, door):
    place, images = f"local-dir:{folder}", torch.randn(1, 3, 96, 128)
    if door == "TimmBackbone":
        backbone = transformers.TimmBackbone.from_pretrained(place, out_indices=(3, 4, 5))
    else:  # its from_pretrained takes no folder at all: it asks the hub first
        config = transformers.TimmBackboneConfig(backbone=place, out_indices=(3, 4, 5))
        backbone = transformers.AutoBackbone.from_config(config, pretrained=True)
    with torch.no_grad():
        maps = backbone.eval()(images).feature_maps
        expected = network.forward_intermediates(images, (1, 2, 3), intermediates_only=True)
    assert backbone.channels == [x.shape[1] for x in expected] == [144, 272, 368]
    for own, theirs in zip(expected, maps, strict=True):
        assert torch.equal(own, theirs)


def test_what_transformers_saves_comes_back(network, folder, tmp_path):
    transformers.AutoModelForImageClassification.from_pretrained(folder).save_pretrained(tmp_path)
    again = from_pretrained(tmp_path).eval()
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(again(images), network(images))


def test_names_must_be_as_many_as_classes(network, tmp_path):
    with pytest.raises(ValueError, match="2 names for 4 classes"):
        save_pretrained(network, tmp_path / "new", classes=["one", "two"])
    assert not (tmp_path / "new").exists()
