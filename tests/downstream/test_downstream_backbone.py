"""The backbone as OpenMMLab sees it: outputs, options, pretrained weights. Needs only mmengine."""

from __future__ import annotations

import importlib.util
import logging
import sys
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("mmengine", reason="OpenMMLab is not installed: make downstream")

from mmengine.registry import MODELS

from downstream.backbone import MobileMambaBackbone
from downstream.pretrained import load_pretrained
from model import create_model
from model.zoo import DownloadError
from model.zoo.transfer import FileSource

STAGES = ("patch_embed", "blocks1", "blocks2", "blocks3")
HEADS = ("head.", "head_dist.")


@pytest.fixture
def filled(parity_fill):
    def build(**options):
        torch.manual_seed(0)
        return parity_fill.fill_(MobileMambaBackbone("T2", **options))

    return build


@pytest.fixture
def imagenet(tmp_path, parity_fill):
    """A file of an ImageNet checkpoint, with the weights in it."""

    def save(variant="MobileMamba_T2", wrap=lambda weights: weights, **options):
        weights = parity_fill.fill_(create_model(variant, **options)).state_dict()
        path = tmp_path / f"{variant}.pth"
        torch.save(wrap(weights), path)
        return path, weights

    return save


def is_evaluating(module):
    return not any(part.training for part in module.modules())


@pytest.mark.parametrize("variant", ["T2", "T4", "S6", "B1"])
def test_entries_are_the_released_ones_without_the_head(variant, parity_json):
    released = parity_json("state_dict.json")[f"MobileMamba_{variant}"]
    expected = {entry: shape for entry, shape in released.items() if not entry.startswith(HEADS)}
    backbone = MobileMambaBackbone(variant)
    assert {entry: list(value.shape) for entry, value in backbone.state_dict().items()} == expected


def test_features_are_the_networks_own_at_an_odd_size(filled, parity_fill):
    network = parity_fill.fill_(create_model("MobileMamba_T2")).eval()
    image = parity_fill.image(1, 333, 500)
    with torch.no_grad():
        own = network.forward_intermediates(image, intermediates_only=True)
        features = filled(out_indices=(0, 1, 2, 3)).eval()(image)
    assert isinstance(features, tuple)
    assert [tuple(feature.shape[2:]) for feature in features] == [(21, 32), (21, 32), (11, 16), (6, 8)]
    assert all(torch.equal(*pair) for pair in zip(features, own, strict=True))
    # mmcv's operators read their memory as it stands.
    assert all(feature.is_contiguous() for feature in features)


@pytest.mark.parametrize("case", ["T2_1x160x224_seed1", "B1_1x256x256_seed0"])
def test_features_are_those_of_the_released_network(case, parity_fill, parity_arrays):
    arrays = parity_arrays("model_eval.npz")
    variant, shape, seed = case.split("_")
    batch, height, width = map(int, shape.split("x"))
    backbone = parity_fill.fill_(MobileMambaBackbone(variant, out_indices=(1, 3))).eval()
    with torch.no_grad():
        features = backbone(parity_fill.image(batch, height, width, int(seed.removeprefix("seed"))))
    for index, feature in zip((1, 3), features, strict=True):
        expected = torch.from_numpy(arrays[f"{case}_feat{index}_channel_mean"])
        means = feature.mean((0, 2, 3))
        torch.testing.assert_close(means, expected.view_as(means), rtol=0, atol=2e-5 * expected.abs().max().item())


@pytest.mark.parametrize("frozen", [-1, 1, 3])
def test_frozen_stages_hold_in_training(filled, frozen):
    backbone = filled(frozen_stages=frozen)
    before = {entry: value.clone() for entry, value in backbone.state_dict().items()}
    backbone.eval().train()
    for index, name in enumerate(STAGES):
        stage = getattr(backbone, name)
        trained = any(parameter.requires_grad for parameter in stage.parameters())
        assert (is_evaluating(stage), trained) == ((True, False) if index <= frozen else (False, True))
    step(backbone)
    changed = {entry.split(".")[0] for entry, value in backbone.state_dict().items() if not value.equal(before[entry])}
    assert changed == set(STAGES[frozen + 1 :])


def step(backbone):
    """Train one step of plain gradient descent."""
    loss = sum(feature.square().mean() for feature in backbone(torch.rand(2, 3, 64, 96)))
    if loss.requires_grad:
        loss.backward()
    with torch.no_grad():
        for parameter in backbone.parameters():
            if parameter.grad is not None:
                parameter -= 0.1 * parameter.grad


def test_norm_eval_keeps_running_statistics_and_trains_weights(filled):
    backbone = filled(norm_eval=True)
    before = {entry: value.clone() for entry, value in backbone.state_dict().items()}
    backbone.eval().train()
    norms = [module for module in backbone.modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms
    assert not any(norm.training for norm in norms)
    assert backbone.blocks1[0].training
    step(backbone)
    after = backbone.state_dict()
    running = [entry for entry in before if "running_" in entry or "num_batches" in entry]
    assert all(after[entry].equal(before[entry]) for entry in running)
    assert not after["blocks3.3.dw0.m.bn.weight"].equal(before["blocks3.3.dw0.m.bn.weight"])


@pytest.mark.parametrize("norm_eval", [False, True])
def test_norm_eval_on_random_weights_warns(filled, monkeypatch, norm_eval):
    warned = []
    monkeypatch.setattr(
        "downstream.backbone.print_log",
        lambda message, *, logger, level=logging.INFO: warned.append("norm_eval=False" in message and level),
    )
    filled(norm_eval=norm_eval).init_weights()
    assert warned == [False, logging.WARNING][: 1 + norm_eval]


def test_sync_bn_changes_no_entry(filled):
    backbone = filled(sync_bn=True, norm_eval=True)
    assert backbone.state_dict().keys() == filled().state_dict().keys()
    assert not any(type(module) is nn.BatchNorm2d for module in backbone.modules())
    norms = [module for module in backbone.train().modules() if isinstance(module, nn.SyncBatchNorm)]
    assert norms
    assert not any(norm.training for norm in norms)


def test_gradient_checkpointing_changes_no_gradient(filled):
    gradients = {}
    for with_cp in (False, True):
        backbone = filled(with_cp=with_cp).train()
        torch.manual_seed(1)
        step(backbone)
        gradients[with_cp] = [parameter.grad for parameter in backbone.parameters() if parameter.requires_grad]
        assert backbone.grad_checkpointing is with_cp
    for plain, recomputed in zip(gradients[False], gradients[True], strict=True):
        torch.testing.assert_close(plain, recomputed, rtol=1e-5, atol=1e-6)


def test_every_trained_parameter_gets_a_gradient_when_late_stages_are_not_asked_for(filled):
    backbone = filled(out_indices=(1, 2)).train()
    step(backbone)
    assert all((parameter.grad is not None) == parameter.requires_grad for parameter in backbone.parameters())
    assert not any(parameter.requires_grad for parameter in backbone.blocks3.parameters())


def test_drop_path_is_the_variants_unless_given():
    assert MobileMambaBackbone("B1").blocks3[-1].drop_path.drop_prob == pytest.approx(0.03)
    assert MobileMambaBackbone("B1", drop_path=0.2).blocks3[-1].drop_path.drop_prob == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "B3"}, r"no variant 'B3'.*T2.*B4"),
        ({"variant": "MobileMamba_b1"}, r"no variant 'MobileMamba_b1'.*did you mean 'B1'"),
        ({"variant": "T2", "out_indices": (1, 4)}, r"out_indices.*0 to 3.*\(1, 4\)"),
        ({"variant": "T2", "out_indices": ()}, r"out_indices"),
        ({"variant": "T2", "out_indices": (2, 1)}, r"rising order"),
        ({"variant": "T2", "frozen_stages": 4}, r"frozen_stages.*-1.*3, got 4"),
    ],
)
def test_options_without_meaning_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        MobileMambaBackbone(**options)


@pytest.mark.parametrize("heads", [{}, {"distillation": True}, {"num_classes": 10}, {"num_classes": 0}])
def test_imagenet_checkpoint_loads_with_the_head_left_over(imagenet, heads):
    path, weights = imagenet(**heads)
    backbone = MobileMambaBackbone("T2", pretrained=str(path))
    left_over = load_pretrained(backbone, path)
    assert left_over == [entry for entry in weights if entry.startswith(HEADS)]
    assert_loaded(backbone, weights)


def assert_loaded(backbone, weights):
    own = backbone.state_dict()
    assert all(own[entry].equal(value) for entry, value in weights.items() if not entry.startswith(HEADS))


def test_pretrained_is_read_when_training_starts(imagenet):
    path, weights = imagenet()
    backbone = MobileMambaBackbone("T2", pretrained=str(path))
    assert not backbone.state_dict()["patch_embed.0.c.weight"].equal(weights["patch_embed.0.c.weight"])
    backbone.init_weights()
    assert_loaded(backbone, weights)


def test_averaged_weights_are_taken_when_asked_for(imagenet):
    def with_average(weights):
        return {"net": weights, "net_E": {entry: value + 1 for entry, value in weights.items()}}

    path, weights = imagenet(wrap=with_average)
    backbone = MobileMambaBackbone("T2", pretrained=str(path), ema=True)
    backbone.init_weights()
    assert_loaded(backbone, {entry: value + 1 for entry, value in weights.items()})


def test_weights_of_a_whole_model_of_openmmlab_serve_as_pretrained(imagenet):
    def as_classifier(weights):
        inside = OrderedDict((f"backbone.{entry}", v) for entry, v in weights.items() if not entry.startswith(HEADS))
        return {"meta": {}, "state_dict": {**inside, "head.fc.weight": torch.zeros(5, 368)}}

    path, weights = imagenet(wrap=as_classifier)
    backbone = MobileMambaBackbone("T2")
    assert load_pretrained(backbone, path) == ["head.fc.weight"]
    assert_loaded(backbone, weights)


def test_checkpoint_of_another_variant_is_refused_and_named(imagenet):
    path, _ = imagenet("MobileMamba_T4")
    backbone = MobileMambaBackbone("T2", pretrained=str(path))
    before = {entry: value.clone() for entry, value in backbone.state_dict().items()}
    with pytest.raises(ValueError, match=r"(?s)MobileMamba_T4.pth.*set model.backbone.variant=T4") as error:
        backbone.init_weights()
    assert len(str(error.value).splitlines()) < 10
    assert all(value.equal(before[entry]) for entry, value in backbone.state_dict().items())


def test_released_checkpoint_is_downloaded_once_and_verified(imagenet, weights_folder, monkeypatch):
    path, weights = imagenet()
    monkeypatch.setattr("model.zoo.fetching.find_sources", lambda entry, source: [FileSource(str(path))])
    for _ in range(2):
        backbone = MobileMambaBackbone("T2", pretrained=True)
        backbone.init_weights()
        assert_loaded(backbone, weights)
        path.unlink(missing_ok=True)
    released = weights_folder / "MobileMamba_T2" / "mobilemamba_t2.pth"
    assert released.is_file()
    torch.save({}, released)
    with pytest.raises(ValueError, match=r"mobilemamba_t2\.pth has .* delete it and get mobilemamba_t2 again"):
        MobileMambaBackbone("T2", pretrained=True).init_weights()


def test_missing_pretrained_files_are_named(tmp_path, weights_folder, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*nowhere\.pth"):
        MobileMambaBackbone("T2", pretrained=str(tmp_path / "nowhere.pth")).init_weights()

    def refuse(*_, **__):
        raise DownloadError("Google Drive does not give mobilemamba_t2: try later")

    monkeypatch.setattr("model.zoo.transfer.DriveSource.get", refuse)
    with pytest.raises(DownloadError, match=r"does not give mobilemamba_t2: .*model.backbone.pretrained=False"):
        MobileMambaBackbone("T2", pretrained=True).init_weights()


def test_module_may_be_imported_twice_under_two_names():
    path = Path(sys.modules["downstream.backbone"].__file__)
    name = "downstream.backbone_again"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    try:
        assert MODELS.get("MobileMamba") is module.MobileMambaBackbone
    finally:
        MODELS.register_module("MobileMamba", module=MobileMambaBackbone, force=True)


@pytest.mark.parametrize("library", ["mmdet", "mmseg", "mmpretrain"])
def test_every_library_finds_the_backbone(library):
    registry = pytest.importorskip(f"{library}.registry", reason="OpenMMLab is not installed: make downstream").MODELS
    assert registry.get("MobileMamba") is MobileMambaBackbone
    with MODELS.switch_scope_and_registry(library) as scoped:
        assert isinstance(scoped.build({"type": "MobileMamba", "variant": "T2"}), MobileMambaBackbone)
