"""Hugging Face's hub and torch.hub: a saved network loads again, through timm too."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch

from model import MobileMamba, create_model, from_pretrained, save_pretrained

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return create_model("MobileMamba_T2", num_classes=4, in_chans=2, d_state=2, scan="cross", drop_path=0.2)


@pytest.fixture(scope="module")
def folder(network, tmp_path_factory):
    return save_pretrained(network, tmp_path_factory.mktemp("hub") / "mine")


def same(one, other):
    return all(torch.equal(x, y) for x, y in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


@pytest.mark.parametrize(
    "load", [from_pretrained, lambda path: timm.create_model(f"local-dir:{path}", pretrained=True)]
)
def test_saved_network_comes_back(network, folder, load):
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors"}
    loaded = load(folder)
    assert same(loaded, network)
    images = torch.randn(1, 2, 64, 96)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(images), network.eval()(images))


def test_config_says_what_it_is(folder, network):
    config = json.loads((folder / "config.json").read_text())
    assert config["architecture"] == "mobilemamba_t2"
    assert config["model_args"] == {"in_chans": 2, "global_pool": "avg", "d_state": 2, "scan": "cross"}
    assert config["num_classes"] == 4
    assert config["pretrained_cfg"]["input_size"] == [2, 192, 192]
    assert config["pretrained_cfg"]["num_classes"] == 4
    assert not {"url", "file"} & set(config["pretrained_cfg"])
    assert len(safetensors.torch.load_file(folder / "model.safetensors")) == len(network.state_dict())


def test_loaded_network_can_be_given_another_head_and_input(network, folder):
    other = from_pretrained(folder, num_classes=9, in_chans=3)
    assert other(torch.randn(2, 3, 64, 96)).shape == (2, 9)
    assert torch.equal(other.blocks1[0].dw0.m.c.weight, network.blocks1[0].dw0.m.c.weight)


def test_network_of_timm_in_another_memory_layout(tmp_path):
    network = timm.create_model("mobilemamba_t2", num_classes=2).to(memory_format=torch.channels_last)
    assert same(from_pretrained(save_pretrained(network, tmp_path)), network)


def test_fine_tuned_head_is_the_one_that_is_saved(tmp_path):
    network = create_model("MobileMamba_T2", num_classes=5)
    network.reset_classifier(2, "max")
    loaded = from_pretrained(save_pretrained(network, tmp_path))
    assert (loaded.num_classes, loaded.global_pool) == (2, "max")
    assert same(loaded, network)


def test_nothing_is_overwritten_unasked(tmp_path, network):
    save_pretrained(network, tmp_path)
    other = create_model("MobileMamba_T2", num_classes=1)
    with pytest.raises(FileExistsError, match=r"config\.json exists"):
        save_pretrained(other, tmp_path)
    assert same(from_pretrained(tmp_path), network)
    assert same(from_pretrained(save_pretrained(other, tmp_path, overwrite=True)), other)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: create_model("MobileMamba_T2").fuse(), "before fuse"),
        (lambda: MobileMamba(num_classes=2), "use create_model"),
    ],
)
def test_network_that_could_not_come_back_is_refused(tmp_path, make, reason):
    with pytest.raises(ValueError, match=reason):
        save_pretrained(make(), tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("source", ["nowhere", "./a/b", "/nowhere/at/all"])
def test_source_that_is_not_there(source):
    with pytest.raises(FileNotFoundError, match="no folder"):
        from_pretrained(source)


def test_folder_without_a_network(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        from_pretrained(tmp_path)


def test_torch_hub_has_every_variant(tmp_path):
    script = f"""
import torch
for name in ("t2", "t4", "s6", "b1", "b2", "b4"):
    network = torch.hub.load({str(ROOT)!r}, f"mobilemamba_{{name}}", source="local", pretrained=False, num_classes=3)
    assert network.default_cfg["architecture"] == f"mobilemamba_{{name}}" and network.num_classes == 3
"""
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True, timeout=300)
