"""Checkpoints of other trainers and tools: which rule found the weights, and what is adapted to the network."""

from __future__ import annotations

import argparse
import logging

import pytest
import torch
from checkpoint_cases import Net, Payload, same, saved
from safetensors.torch import save_file
from torch import nn

from model import create_model
from model.checkpoint import load_checkpoint, network_prefixes, read_checkpoint, select_state_dict

WEIGHTS = Net().state_dict()
ARGUMENTS = argparse.Namespace(model="mobilemamba_t2", lr=0.1, opt_betas=None, input_size=(3, 224, 224))
T2 = "MobileMamba_T2"


def prefixed(prefix: str) -> dict[str, torch.Tensor]:
    return {f"{prefix}{name}": value for name, value in WEIGHTS.items()}


@pytest.mark.parametrize(
    ("contents", "source", "removed"),
    [
        ({"epoch": 5, "model_state_dict": WEIGHTS, "loss": 0.4}, "model_state_dict", ""),
        ({"module": WEIGHTS, "optimizer": None, "ds_version": "0.16"}, "module", ""),
        ({"module": prefixed("module."), "ds_version": "0.16"}, "module", "module."),
        ({"model": {"name": "t2"}, "state_dict": WEIGHTS}, "state_dict", ""),
        ({"state_dict": prefixed("model."), "pytorch-lightning_version": "2.5"}, "state_dict", "model."),
        ({"state_dict": prefixed("model._orig_mod."), "epoch": 1}, "state_dict", "model._orig_mod."),
        ({"state_dict": prefixed("module.net."), "epoch": 1}, "state_dict", "module.net."),
        ({"meta": {}, "state_dict": prefixed("backbone.")}, "state_dict", "backbone."),
        (prefixed("net."), "bare", "net."),
        ({"state_dict": WEIGHTS, "state_dict_ema": prefixed("module."), "args": ARGUMENTS}, "state_dict", ""),
    ],
    ids=[
        *("tutorial", "deepspeed", "deepspeed-ddp", "config", "lightning", "lightning-compiled"),
        *("ddp-attribute", "openmmlab", "bare-attribute", "timm"),
    ],
)
def test_file_of_another_trainer(tmp_path, caplog, contents, source, removed):
    network = Net()
    with caplog.at_level(logging.INFO):
        report = load_checkpoint(network, saved(tmp_path, contents))
    assert (report.source, report.fits) == (source, True)
    assert same(network.state_dict(), WEIGHTS)
    assert f"loaded {len(WEIGHTS)} entries of {source}" in caplog.text
    assert (f"removed '{removed}' from the start of every name" in caplog.text) == bool(removed)


def test_averaged_weights_of_timm(tmp_path):
    plain = {name: torch.zeros_like(value) for name, value in WEIGHTS.items()}
    network = Net()
    path = saved(tmp_path, {"state_dict": plain, "state_dict_ema": prefixed("module."), "args": ARGUMENTS})
    assert load_checkpoint(network, path, ema=True).source == "state_dict_ema"
    assert same(network.state_dict(), WEIGHTS)
    assert read_checkpoint(path)["args"] == ARGUMENTS


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_code_in_a_namespace_is_refused_and_not_run(tmp_path, zipped):
    contents = {"state_dict": WEIGHTS, "args": argparse.Namespace(lr=Payload(tmp_path / "marker"))}
    path = saved(tmp_path, contents, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"holds code .*asks for \w+\.system"):
        read_checkpoint(path)
    assert not (tmp_path / "marker").exists()


def test_prefix_that_the_network_has_too_stays(tmp_path):
    wrapped = nn.ModuleDict({"model": Net()})
    path = saved(tmp_path, {"net": prefixed("module.model.")})
    assert load_checkpoint(wrapped, path).fits
    assert same(wrapped["model"].state_dict(), WEIGHTS)


def test_prefix_of_a_part_stays_unless_a_network_by_itself_is_wanted():
    checkpoint = {"state_dict": prefixed("backbone.")}
    assert list(select_state_dict(checkpoint, ema=False)[0]) == list(checkpoint["state_dict"])
    assert list(select_state_dict(checkpoint, ema=False, prefixes=network_prefixes())[0]) == list(WEIGHTS)


def test_safetensors_in_capitals(tmp_path):
    save_file(WEIGHTS, tmp_path / "a.SafeTensors")
    network = Net()
    assert load_checkpoint(network, tmp_path / "a.SafeTensors").fits
    assert same(network.state_dict(), WEIGHTS)


@pytest.fixture(scope="module")
def classifier():
    torch.manual_seed(0)
    return create_model(T2, num_classes=3).state_dict()


def test_classifier_for_features(tmp_path, classifier, caplog):
    path = saved(tmp_path, classifier)
    with caplog.at_level(logging.INFO):
        network = create_model(T2, num_classes=0, checkpoint_path=path)
    assert "left out the head, 7 entries: the network has none" in caplog.text
    assert all(torch.equal(value, classifier[name]) for name, value in network.state_dict().items())
    assert not any(name.startswith("head") for name in network.state_dict())


def test_distilled_classifier_for_features(tmp_path):
    distilled = create_model(T2, num_classes=3, distillation=True).state_dict()
    path = saved(tmp_path, distilled)
    with pytest.raises(ValueError, match=r"7 unexpected in the file: head_dist 7"):
        create_model(T2, num_classes=3, checkpoint_path=path)
    network = create_model(T2, num_classes=0, checkpoint_path=path)
    assert all(torch.equal(value, distilled[name]) for name, value in network.state_dict().items())


@pytest.mark.parametrize("channels", [1, 2, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_input_channels(tmp_path, classifier, caplog, channels, dtype):
    path = saved(tmp_path, {name: value.to(dtype) for name, value in classifier.items()})
    with caplog.at_level(logging.INFO):
        network = create_model(T2, num_classes=3, in_chans=channels, checkpoint_path=path)
    stem, adapted = classifier["patch_embed.0.c.weight"].to(dtype).float(), network.patch_embed[0].c.weight
    expected = stem.sum(1, keepdim=True) if channels == 1 else stem.repeat(1, 2, 1, 1)[:, :channels] * 3 / channels
    torch.testing.assert_close(adapted.detach(), expected, rtol=2e-3, atol=2e-3)
    assert f"adapted patch_embed.0.c.weight from 3 to {channels} input channels" in caplog.text


def test_gray_network_for_colour(tmp_path):
    gray = create_model(T2, num_classes=2, in_chans=1).state_dict()
    network = create_model(T2, num_classes=2, checkpoint_path=saved(tmp_path, gray))
    stem = gray["patch_embed.0.c.weight"]
    torch.testing.assert_close(network.patch_embed[0].c.weight.detach(), stem.expand(-1, 3, -1, -1) / 3)


def test_stem_that_reads_blocks_of_pixels_is_not_adapted(tmp_path):
    def build(channels: int) -> nn.Module:
        network = nn.Sequential(nn.Conv2d(16 * channels, 4, 3))
        network.default_cfg = {"classifier": "fc", "first_conv": "0", "input_size": (3, 224, 224)}
        return network

    with pytest.raises(ValueError, match="1 of another shape"):
        load_checkpoint(build(1), saved(tmp_path, build(3).state_dict()))
