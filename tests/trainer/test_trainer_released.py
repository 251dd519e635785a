"""Released checkpoints by way of a configuration."""

from __future__ import annotations

import pytest
import torch

from configs import load_config
from model import create_model
from trainer.network import build_tested_network
from util.distributed import Process


@pytest.mark.parametrize(
    ("config", "overrides", "name"),
    [
        ("mobilemamba_t2", [], "T2"),
        ("mobilemamba_t2s", [], "T2s"),
        ("mobilemamba_t2", ["model.model_kwargs.pretrained=mobilemamba_t2s"], "T2s"),
        ("mobilemamba_t2s", ["model.model_kwargs.pretrained=mobilemamba_t2"], "T2"),
    ],
)
def test_pretrained_is_the_recipes_own_checkpoint_or_the_one_named(config, overrides, name, weights_folder):
    released = create_model("MobileMamba_T2").state_dict()
    file = weights_folder / f"MobileMamba_{name}" / f"mobilemamba_{name.lower()}.pth"
    file.parent.mkdir()
    torch.save({"net": released}, file)
    given = ["model.model_kwargs.pretrained=true", *overrides]
    network = build_tested_network(
        load_config(f"configs/mobilemamba/{config}", given, mode="test"), Process(), None, ema=False
    )
    assert all(torch.equal(value, released[entry]) for entry, value in network.state_dict().items())
