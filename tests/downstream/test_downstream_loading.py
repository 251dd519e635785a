"""Checkpoints of mmengine's own making are read, and code in one is never run."""

from __future__ import annotations

import functools
import os

import pytest
import torch

pytest.importorskip("mmengine", reason="OpenMMLab is not installed: make downstream")

from mmengine.logging import HistoryBuffer, MessageHub
from mmengine.runner import load_checkpoint
from mmengine.runner.checkpoint import _load_checkpoint

import downstream.loading


class Touch:
    """Pickles to a command."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


class Reach:
    """Pickles to an attribute of any object."""

    def __reduce__(self):
        return getattr, (HistoryBuffer, "__init__")


def test_what_a_training_saves_is_read_whole(tmp_path):
    hub = MessageHub("test_what_a_training_saves_is_read_whole")
    for value in (3.0, 2.0):
        hub.update_scalar("train/loss", value)
    hub.update_info("epoch", 4)
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))])
    saved = {
        "meta": {"epoch": 4, "dataset_meta": {"classes": ("circle",), "palette": [(1, 2, 3)]}},
        "state_dict": {"weight": torch.arange(3.0)},
        "message_hub": hub.state_dict(),
        "optimizer": optimizer.state_dict(),
    }
    path = tmp_path / "epoch_4.pth"
    torch.save(saved, path)
    checkpoint = _load_checkpoint(str(path), map_location="cpu")
    assert torch.equal(checkpoint["state_dict"]["weight"], torch.arange(3.0))
    assert checkpoint["meta"] == saved["meta"]
    assert checkpoint["optimizer"] == saved["optimizer"]
    again = MessageHub("again")
    again.load_state_dict(checkpoint["message_hub"])
    assert again.get_scalar("train/loss").mean(2) == 2.5
    assert again.get_info("epoch") == 4


@pytest.mark.parametrize("code", [functools.partial(Touch, "touched"), Reach], ids=["command", "attribute"])
def test_code_is_refused_and_not_run(tmp_path, monkeypatch, code):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {"weight": torch.ones(1)}, "meta": code()}, "code.pth")
    with pytest.raises(ValueError, match=r"code\.pth.*holds code"):
        load_checkpoint(torch.nn.Linear(1, 1), "code.pth")
    assert not (tmp_path / "touched").exists()


def test_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*nowhere\.pth"):
        downstream.loading.load_local_checkpoint(str(tmp_path / "nowhere.pth"))


@pytest.mark.parametrize("layout", [lambda weights: weights, lambda weights: {"model": weights, "epoch": 3}])
def test_weights_are_found_wherever_they_stand(tmp_path, layout):
    weights = torch.nn.Linear(2, 2).state_dict()
    torch.save(layout({f"module.{entry}": value for entry, value in weights.items()}), tmp_path / "w.pth")
    network = torch.nn.Linear(2, 2)
    load_checkpoint(network, str(tmp_path / "w.pth"), strict=True)
    assert all(torch.equal(value, weights[entry]) for entry, value in network.state_dict().items())
