"""Frozen parts stay bit for bit, the rest learns, and a run that freezes can be stopped and resumed."""

from __future__ import annotations

import pytest
import torch
from timm.models import create_model as create_timm_model
from torch import nn
from trainer_cases import CONFIG, assert_same, short_run

from configs import load_config
from model import create_model
from trainer import Run, build_run
from trainer.checkpoint import load_training_checkpoint
from trainer.freeze import FrozenParts
from trainer.train import train
from util.distributed import Process

QUICK = ("epoch_full=2", "warmup_epochs=0", "trainer.mixup_kwargs.prob=0", "optim.lr=1e-2", "weight_decay=0.05")


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """A checkpoint of 1000 classes, as the released ones are, with statistics that no fresh network has."""
    torch.manual_seed(0)
    network = create_model("MobileMamba_T2")
    network.train()
    with torch.no_grad():
        network(torch.randn(4, 3, 64, 64))
    path = tmp_path_factory.mktemp("weights") / "t2.pth"
    torch.save({"net": network.state_dict()}, path)
    return path


@pytest.fixture
def tune(class_folders, tmp_path, released):
    """Set up a run that fine-tunes, with the class count left to the folders."""

    def make(*more: str) -> Run:
        path = f"model.model_kwargs.checkpoint_path={released}"
        arguments = short_run(class_folders, tmp_path / "runs", "nb_classes=None", path, *QUICK, *more)
        return build_run(load_config(CONFIG, arguments, mode="ft"), Process())

    return make


@pytest.mark.parametrize(
    ("parts", "trained"),
    [
        ("backbone", ("head.",)),
        ("stem, blocks1", ("blocks2.", "blocks3.", "head.")),
        ("patch_embed,blocks1,blocks2.0", ("blocks2.", "blocks3.", "head.")),
    ],
)
def test_frozen_parts_stay_bit_for_bit_and_the_rest_learns(tune, released, parts, trained):
    run = tune(f"model.freeze={parts}")
    assert run.config.nb_classes == 3
    start = {name: value.clone() for name, value in run.network.state_dict().items()}
    before = torch.load(released, weights_only=True)["net"]
    frozen = [
        name for name in start if not name.startswith(trained) or ("2.0" in parts and name.startswith("blocks2.0."))
    ]
    assert all(torch.equal(start[name], before[name]) for name in frozen)
    optimised = {id(parameter) for group in run.optimizer.param_groups for parameter in group["params"]}
    learning = {name: value for name, value in run.network.named_parameters() if value.requires_grad}
    assert optimised == {id(value) for value in learning.values()}
    assert set(learning).isdisjoint(frozen)
    compute_loss, in_training = run.stepper.compute_loss, set()

    def look(images, targets):
        in_training.update(name for name, module in run.network.named_modules() if module.training)
        return compute_loss(images, targets)

    run.stepper.compute_loss = look
    assert train(run) == 0
    assert "head.bn" in in_training
    assert not any(name.startswith(("patch_embed", "blocks1")) for name in in_training)
    for weights in (run.network.state_dict(), run.average.module.state_dict()):
        changed = {name for name, value in weights.items() if not torch.equal(value, start[name])}
        assert changed.isdisjoint(frozen)
        assert {"head.l.weight", "head.l.bias", "head.bn.running_mean", "head.bn.weight"} <= changed


def test_layer_decay_gives_the_same_rates_with_and_without_freezing(tune):
    def rates(run):
        names = {id(parameter): name for name, parameter in run.network.named_parameters()}
        groups = run.optimizer.param_groups
        return {names[id(parameter)]: group["lr_scale"] for group in groups for parameter in group["params"]}

    whole, part = (
        rates(tune("optim.layer_decay=0.5")),
        rates(tune("optim.layer_decay=0.5", "model.freeze=stem,blocks1")),
    )
    assert part == {name: scale for name, scale in whole.items() if not name.startswith(("patch_embed.", "blocks1."))}
    assert whole["head.l.weight"] == 1.0
    assert whole["patch_embed.0.c.weight"] < part["blocks2.0.0.m.c.weight"] < part["blocks3.0.0.m.c.weight"] < 1.0


def test_a_frozen_run_resumes_bit_for_bit_and_not_with_other_parts(tune):
    whole = tune("model.freeze=stem,blocks1")
    assert train(whole) == 0
    stopped = tune("model.freeze=stem,blocks1", "trainer.save_per_iter=1")
    compute_loss, calls = stopped.stepper.compute_loss, iter(range(9))

    def failing(images, targets):
        if next(calls) == 4:
            raise ValueError("stopped")
        return compute_loss(images, targets)

    stopped.stepper.compute_loss = failing
    with pytest.raises(RuntimeError, match="stopped"):
        train(stopped)
    resume = f"trainer.resume_dir={stopped.folder}"
    resumed = tune("model.freeze=stem,blocks1", resume)
    assert resumed.state.iteration == 4
    assert train(resumed) == 0
    left, right = (load_training_checkpoint(run.folder / "latest_ckpt.pth") for run in (whole, resumed))
    assert_same({name: left[name] for name in ("net", "net_E", "optimizer")},
                {name: right[name] for name in ("net", "net_E", "optimizer")})  # fmt: skip
    with pytest.raises(ValueError, match=r"model\.freeze='stem,blocks1', this run has 'backbone'"):
        tune("model.freeze=backbone", resume)


@pytest.mark.parametrize(
    ("name", "parts", "trained"),
    [
        ("resnet18", "backbone", {"fc.weight", "fc.bias"}),
        ("resnet18", "stem,layer1,layer2,layer3,layer4.0", None),
        ("vit_tiny_patch16_224", "backbone", {"head.weight", "head.bias"}),
    ],
)
def test_networks_of_timm(name, parts, trained):
    network = create_timm_model(name, num_classes=2)
    frozen = FrozenParts(network, parts)
    network.train()
    frozen.hold()
    learning = {key for key, parameter in network.named_parameters() if parameter.requires_grad}
    if trained is None:
        assert all(key.startswith(("layer4.1.", "fc.")) for key in learning)
        assert (network.bn1.training, network.layer4[0].bn1.training, network.layer4[1].bn1.training) == (0, 0, 1)
    else:
        assert learning == trained


def test_both_heads_of_a_distilled_network_learn():
    network = create_model("MobileMamba_T2", num_classes=2, distillation=True)
    FrozenParts(network, "backbone")
    assert {key.split(".")[0] for key, value in network.named_parameters() if value.requires_grad} == {
        "head",
        "head_dist",
    }


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ("block1", "no part 'block1'; did you mean 'blocks1'"),
        ("backbone,head", "nothing to train"),
        ("blocks1,,blocks9", "'blocks9'"),
    ],
)
def test_mistakes_are_named(parts, message):
    with pytest.raises(ValueError, match=message):
        FrozenParts(create_model("MobileMamba_T2"), parts)


def test_backbone_needs_a_network_that_knows_its_head():
    with pytest.raises(ValueError, match=r"Sequential does not; name modules: 0, 1"):
        FrozenParts(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), "backbone")
