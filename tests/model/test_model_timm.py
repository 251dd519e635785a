"""The variants as timm's models: what timm asks of its own networks, and where their weights come from.

Two demands of timm do not apply. TorchScript cannot compile operators written in Python; tracing works. And the Haar
filters are parameters without a gradient.
"""

from __future__ import annotations

import math

import pytest
import timm
import torch
from timm.data import resolve_data_config
from timm.models import FeatureInfo, group_parameters
from torch import nn

from benchmarks.networks import settle
from model import create_model, timm_models
from model.mobilemamba import VARIANTS

NAMES = [name.lower() for name in VARIANTS]
SMALL = "mobilemamba_t2"


@pytest.fixture
def network():
    torch.manual_seed(0)
    return timm.create_model(SMALL, num_classes=7).eval()


@pytest.fixture
def released(tmp_path, monkeypatch):
    """Put a file in the place of every released checkpoint; returns its weights and the names that were asked for."""
    torch.manual_seed(1)
    weights = create_model(SMALL).state_dict()
    file = tmp_path / "released.pth"
    torch.save({"net": weights}, file)
    asked = []

    def fetch(entry):
        asked.append(entry.name)
        return file

    monkeypatch.setattr(timm_models, "fetch", fetch)
    return weights, asked


def test_every_variant_is_listed_with_both_of_its_checkpoints(parity_json):
    assert timm.list_models("mobilemamba*") == sorted(NAMES)
    tagged = {f"{name}.{tag}" for name in NAMES for tag in ("in1k", "dist_in1k")}
    assert set(timm.list_pretrained("mobilemamba*")) == tagged
    for name, published in parity_json("published.json")["imagenet"].items():
        variant = name.removesuffix("s")
        tag = "dist_in1k" if name.endswith("s") else "in1k"
        cfg = timm.get_pretrained_cfg(f"{variant}.{tag}")
        assert published["drive_id"] in cfg.url
        assert cfg.input_size == (3, published["size"], published["size"])
        assert timm.get_pretrained_cfg(variant).tag == "in1k"


@pytest.mark.parametrize("name", NAMES)
def test_default_cfg_is_the_networks(name):
    with torch.device("meta"):
        network = timm.create_model(name).eval()
    cfg = network.default_cfg
    entries = network.state_dict()
    assert f"{cfg['first_conv']}.weight" in entries
    assert f"{cfg['classifier']}.weight" in entries
    images = torch.empty(1, *cfg["input_size"], device="meta")
    features = network.forward_features(images)
    pooled = network.forward_head(features, pre_logits=True)
    assert features.shape == (1, network.num_features, *cfg["pool_size"])
    assert pooled.shape == (1, network.head_hidden_size)
    network.reset_classifier(0)
    assert network(images).shape == pooled.shape
    network.reset_classifier(0, "")
    assert network(images).shape == features.shape
    headless = timm.create_model(name, num_classes=0, global_pool="").eval()
    assert headless(torch.randn(1, 3, 65, 64)).shape == (1, headless.num_features, 2, 1)


def test_test_transform_is_the_recipes(network):
    config = resolve_data_config(model=network)
    assert config["input_size"] == (3, 192, 192)
    assert (config["crop_pct"], config["interpolation"], config["crop_mode"]) == (0.875, "bicubic", "center")
    assert config["mean"] == (0.485, 0.456, 0.406)
    assert config["std"] == (0.229, 0.224, 0.225)


def test_forward_is_the_same_with_gradient_checkpointing(network):
    images = torch.randn(1, 3, 96, 96)
    expected = network(images)
    assert expected.shape == (1, 7)
    assert expected.isfinite().all()
    network.set_grad_checkpointing()
    torch.testing.assert_close(network(images), expected)
    last, _ = network.forward_intermediates(images)
    torch.testing.assert_close(last, network.forward_features(images))


def test_every_trained_parameter_has_a_gradient(network):
    network.train()(torch.randn(2, 3, 96, 96)).mean().backward()
    assert [name for name, value in network.named_parameters() if value.requires_grad and value.grad is None] == []
    fixed = {name.rpartition(".")[2] for name, value in network.named_parameters() if not value.requires_grad}
    assert fixed == {"wt_filter", "iwt_filter"}


@pytest.mark.parametrize("kind", ["getter", "list", "dict", "hook", "fx"])
def test_features_only(kind, network):
    features_only = timm.create_model(SMALL, features_only=True, out_indices=(3, 5), feature_cls=kind).eval()
    weights = {name.removeprefix("model."): value for name, value in features_only.state_dict().items()}
    weights = {name.removeprefix("body.").removeprefix("graph_module."): value for name, value in weights.items()}
    network.load_state_dict(weights, strict=False)
    images = torch.randn(2, 3, 70, 100)
    with torch.no_grad():
        outputs = features_only(images)
        expected = network.forward_intermediates(images, (1, 3), intermediates_only=True)
    outputs = list(outputs.values()) if isinstance(outputs, dict) else outputs
    assert features_only.feature_info.channels() == [x.shape[1] for x in outputs] == [144, 368]
    assert features_only.feature_info.reduction() == [16, 64]
    for actual, wanted in zip(outputs, expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-5)


def test_features_by_default_are_the_six_levels(network):
    features_only = timm.create_model(SMALL, features_only=True).eval()
    assert features_only.feature_info.reduction() == [2, 4, 8, 16, 32, 64]
    assert not any("head" in name for name in features_only.state_dict())
    network.load_state_dict(features_only.model.state_dict(), strict=False)
    seen = []
    for name in ("1", "3", "5"):
        getattr(network.patch_embed, name).register_forward_hook(lambda _, inputs, output: seen.append(output.clone()))
    images = torch.randn(1, 3, 70, 100)
    with torch.no_grad():
        maps = features_only(images)
        expected = network.forward_intermediates(images, (1, 2, 3), intermediates_only=True)
    assert features_only.feature_info.channels() == [x.shape[1] for x in maps] == [18, 36, 72, 144, 272, 368]
    for actual, wanted in zip(maps, [*seen, *expected], strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-5)


def test_features_can_be_those_of_a_network_by_name():
    network = timm.create_model(SMALL, features_only=True, stem_features=False)
    assert network.feature_info.reduction() == [16, 32, 64]
    assert network.out_indices == [1, 2, 3]


@pytest.mark.parametrize("level", range(6))
def test_folded_levels_agree_wherever_the_network_is_cut(level):
    torch.manual_seed(level)
    network = settle(timm.create_model(SMALL, features_only=True, out_indices=(level, 0)))
    images = torch.randn(2, 3, 70, 100)
    with torch.no_grad():
        expected = network(images)
        network.model.fuse()
        actual = network(images)
        last = network.model.forward_features(images)
    assert [x.shape[1] for x in actual] == network.feature_info.channels()
    for x, y in zip([*actual, last], [*expected, expected[0]], strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


def test_a_folded_stem_is_not_cut():
    network = create_model(SMALL, stem_features=True).fuse()
    with pytest.raises(ValueError, match="before fuse"):
        network.prune_intermediate_layers([1])


def test_another_output_stride_is_refused():
    with pytest.raises(ValueError, match="output_stride: leave it out"):
        timm.create_model(SMALL, features_only=True, output_stride=16)


def test_intermediates_are_the_stages(network):
    info = FeatureInfo(network.feature_info, len(network.feature_info))
    images = torch.randn(1, 3, 97, 130)
    with torch.no_grad():
        last, maps = network.forward_intermediates(images, output_fmt="NCHW")
        features = network.forward_features(images)
    assert torch.equal(last, features)
    sizes = [(math.ceil(97 / stride), math.ceil(130 / stride)) for stride in info.reduction()]
    assert [(x.shape[1], tuple(x.shape[2:])) for x in maps] == list(zip(info.channels(), sizes, strict=True))


@pytest.mark.parametrize(("indices", "expected"), [(2, [2, 3]), ([-1, 0], [3, 0]), ((1,), [1]), (None, [0, 1, 2, 3])])
def test_intermediates_by_number_or_by_index(network, indices, expected):
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        _, every = network.forward_intermediates(images)
        last, some = network.forward_intermediates(images, indices, stop_early=True)
    assert [[x is not y and torch.equal(x, y) for y in every].index(True) for x in some] == expected
    assert torch.equal(last, every[max(expected)])


@pytest.mark.parametrize("indices", [0, 5, [4], [-5], []])
def test_intermediates_that_are_not_there_are_refused(network, indices):
    with pytest.raises(ValueError, match=r"4 features \(patch_embed, blocks1, blocks2, blocks3"):
        network.forward_intermediates(torch.randn(1, 3, 64, 64), indices)


def test_intermediates_in_another_format_are_refused(network):
    with pytest.raises(ValueError, match="NHWC"):
        network.forward_intermediates(torch.randn(1, 3, 64, 64), output_fmt="NHWC")


def test_pruned_network_gives_the_stages_that_are_left(network):
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = network.forward_intermediates(images, [1, 2], intermediates_only=True)
        assert network.prune_intermediate_layers([1, -2]) == [1, 2]
        actual = network.forward_intermediates(images, [1, 2], intermediates_only=True)
        output = network(images)
    assert all(torch.equal(x, y) for x, y in zip(actual, expected, strict=True))
    assert torch.equal(output, expected[-1])
    assert not any(name.startswith(("blocks3", "head")) for name in network.state_dict())
    assert network.num_features == network.head_hidden_size == 272
    with pytest.raises(ValueError, match="3 features"):
        network.forward_intermediates(images, [3])
    network.reset_classifier(5, "avg")
    assert network(images).shape == (1, 5)


def test_head_can_be_kept_when_all_stages_are(network):
    network.prune_intermediate_layers(1, prune_head=False)
    assert network(torch.randn(1, 3, 64, 64)).shape == (1, 7)


def test_new_classifier_is_like_the_rest_of_the_network(network):
    network.to("meta", torch.bfloat16).reset_classifier(3)
    assert {(value.device.type, value.dtype) for value in network.head.parameters()} == {("meta", torch.bfloat16)}
    assert not network.head.training
    assert network.get_classifier() is network.head
    assert network.num_classes == 3


@pytest.mark.parametrize(("pooling", "reduce"), [("avg", torch.mean), ("max", torch.amax)])
def test_pooling(network, pooling, reduce):
    network.reset_classifier(0, pooling)
    images = torch.randn(2, 3, 128, 192)
    with torch.no_grad():
        assert torch.equal(network(images), reduce(network.forward_features(images), (2, 3)))


@pytest.mark.parametrize(("arguments", "reason"), [((5, ""), "set num_classes=0"), ((5, "catavg"), "'catavg'")])
def test_impossible_pooling_is_refused(network, arguments, reason):
    with pytest.raises(ValueError, match=reason):
        network.reset_classifier(*arguments)


def test_dropout_and_drop_path_are_those_of_training():
    torch.manual_seed(0)
    network = timm.create_model(SMALL, drop_rate=0.5, drop_path_rate=0.4)
    rates = [module.drop_prob for name, module in network.named_modules() if name.endswith("drop_path")]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])
    features = torch.ones(4, 368, 2, 2)
    dropped = network.forward_head(features, pre_logits=True)
    assert 0.4 < (dropped == 0).float().mean() < 0.6
    assert torch.equal(network.eval().forward_head(features, pre_logits=True), torch.ones(4, 368))


@pytest.mark.parametrize("coarse", [False, True])
def test_every_parameter_belongs_to_one_layer(network, coarse):
    groups = group_parameters(network, network.group_matcher(coarse=coarse))
    names = [name for group in groups.values() for name in group]
    assert sorted(names) == sorted(name for name, _ in network.named_parameters())
    assert len(groups) == (5 if coarse else 1 + 1 + 5 + 5 + 1)  # stem, what the stages are made of, head


@pytest.mark.parametrize("num_classes", [1000, 5, 0])
def test_released_weights_are_adapted_as_timm_does(released, num_classes):
    weights, asked = released
    network = timm.create_model(f"{SMALL}.dist_in1k", pretrained=True, in_chans=1, num_classes=num_classes)
    own = network.state_dict()
    assert asked == ["mobilemamba_t2s"]
    torch.testing.assert_close(own.pop("patch_embed.0.c.weight"), weights["patch_embed.0.c.weight"].sum(1, True))
    new = {"head.l.weight", "head.l.bias"} if num_classes == 5 else set()
    assert {name for name, value in own.items() if name in new or torch.equal(value, weights[name])} == set(own)
    assert network(torch.randn(2, 1, 64, 96)).shape == (2, num_classes or 368)


def test_released_weights_come_with_features_only(released):
    weights, asked = released
    network = timm.create_model(SMALL, pretrained=True, features_only=True)
    assert asked == [SMALL]
    own = {name.removeprefix("model."): value for name, value in network.state_dict().items()}
    assert all(torch.equal(value, weights[name]) for name, value in own.items())


def test_nothing_is_fetched_for_weights_of_ones_own(released, tmp_path):
    _, asked = released
    own = create_model(SMALL, num_classes=1000).state_dict()
    torch.save(own, tmp_path / "own.pth")
    timm.create_model(SMALL)
    network = timm.create_model(SMALL, pretrained=True, pretrained_cfg_overlay={"file": str(tmp_path / "own.pth")})
    assert asked == []
    assert torch.equal(network.head.l.weight, own["head.l.weight"])


def test_unknown_tag_is_refused():
    with pytest.raises(RuntimeError, match="in22k"):
        timm.create_model(f"{SMALL}.in22k", pretrained=True)


def test_distilled_network_has_two_classifiers():
    network = create_model(SMALL, num_classes=4, distillation=True)
    entries = network.state_dict()
    assert all(f"{name}.weight" in entries for name in network.default_cfg["classifier"])
    assert isinstance(network.get_classifier(), nn.ModuleList)
