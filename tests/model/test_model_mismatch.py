"""Loading weights into a network: what fits, what does not and how it is reported, heads of another size."""

from __future__ import annotations

import copy
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from checkpoint_cases import Net, same, saved
from torch import nn

from model import create_model
from model import variant_shapes as released_shapes
from model.checkpoint import load_checkpoint

VARIANTS = {"Small": {"width": 8}, "Large": {"width": 16, "depth": 6}, "LargeToo": {"width": 16, "depth": 6}}


def variant_shapes() -> dict[str, dict[str, torch.Size]]:
    return {name: {k: v.shape for k, v in Net(**kw).state_dict().items()} for name, kw in VARIANTS.items()}


@pytest.mark.parametrize("ema", [False, True])
def test_load_takes_what_was_asked_for(tmp_path: Path, ema: bool) -> None:
    plain, averaged, network = Net(), Net(), Net()
    path = saved(tmp_path, {"net": plain.state_dict(), "net_E": averaged.state_dict(), "epoch": 1})
    report = load_checkpoint(network, path, ema=ema)
    assert report.source == ("net_E" if ema else "net")
    assert report.fits
    assert same(network.state_dict(), (averaged if ema else plain).state_dict())
    path.write_bytes(b"")  # the weights are copies, no longer tied to the file
    assert same(network.state_dict(), (averaged if ema else plain).state_dict())


def test_half_precision_weights_become_the_networks(tmp_path: Path) -> None:
    source, network = Net().half(), Net()
    load_checkpoint(network, saved(tmp_path, source.state_dict()))
    assert network.patch_embed.weight.dtype == torch.float32
    assert torch.equal(network.patch_embed.weight, source.patch_embed.weight.float())


def test_report_is_grouped_and_network_untouched(tmp_path: Path) -> None:
    network, other = Net(depth=40), Net(depth=40)
    weights = {
        name: value for name, value in other.state_dict().items() if not name.startswith(("blocks1.1", "patch_embed"))
    }
    weights |= {"neck.a": torch.zeros(1), "blocks1.0.weight": torch.zeros(3, 8)}
    before = copy.deepcopy(network.state_dict())
    path = saved(tmp_path, {"net": weights})
    with pytest.raises(ValueError, match="does not fit Net-40") as caught:
        load_checkpoint(network, path, name="Net-40")
    message = str(caught.value)
    assert message.startswith(f"{path} (net) does not fit Net-40.")
    assert (
        "24 missing from the file: patch_embed 2 (patch_embed.weight, patch_embed.bias); "
        "blocks1 22 (blocks1.1.weight, blocks1.1.bias, ...)." in message
    )
    assert "1 unexpected in the file: neck 1 (neck.a)." in message
    assert "1 of another shape, the file's for the network's: blocks1 1 (blocks1.0.weight 3x8 for 8x8)." in message
    assert len(message) < 600 + len(str(path))
    assert same(network.state_dict(), before)


def test_not_strict_loads_what_fits_and_warns(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    network, other = Net(), Net(depth=3, num_classes=7)
    weights = other.state_dict()
    del weights["patch_embed.bias"]
    kept = {name: network.state_dict()[name].clone() for name in ("patch_embed.bias", "head.l.weight", "head.l.bias")}
    report = load_checkpoint(network, saved(tmp_path, weights), strict=False)
    assert report.missing == ("patch_embed.bias",)
    assert report.unexpected == ("blocks1.2.weight", "blocks1.2.bias")
    assert report.mismatched == ("head.l.weight", "head.l.bias")
    expected = {name: kept.get(name, weights.get(name)) for name in network.state_dict()}
    assert same(network.state_dict(), expected)
    assert [record.levelname for record in caplog.records if record.levelname != "INFO"] == ["WARNING"]
    assert "1 missing from the file" in caplog.text
    assert "2 unexpected in the file" in caplog.text


def test_not_strict_still_refuses_a_file_of_which_nothing_fits(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not fit"):
        load_checkpoint(Net(), saved(tmp_path, {"fc.weight": torch.zeros(2, 2)}), strict=False)


def test_head_of_another_size_names_both_counts(tmp_path: Path) -> None:
    path = saved(tmp_path, Net(num_classes=1000).state_dict())
    with pytest.raises(ValueError, match=r"head\.l has 1000 classes in the file and 10 in the network") as caught:
        load_checkpoint(Net(num_classes=10), path, variants=variant_shapes)
    assert "model.model_kwargs.num_classes=1000" in str(caught.value)
    assert "-m ft" in str(caught.value)
    assert "looks like" not in str(caught.value)


def test_reset_head_keeps_the_fresh_head(tmp_path: Path) -> None:
    network, other = Net(num_classes=10), Net(num_classes=1000)
    nn.init.constant_(other.head.bn.running_mean, 3.0)
    fresh = copy.deepcopy(network.head.l.state_dict())
    report = load_checkpoint(network, saved(tmp_path, other.state_dict()), reset_head=True)
    assert report.fits
    assert report.reset == ("head.l.weight", "head.l.bias")
    assert same(network.head.l.state_dict(), fresh)
    assert torch.equal(network.head.bn.running_mean, other.head.bn.running_mean)
    assert torch.equal(network.patch_embed.weight, other.patch_embed.weight)


def test_reset_head_loads_a_head_of_the_same_size(tmp_path: Path) -> None:
    network, other = Net(), Net()
    report = load_checkpoint(network, saved(tmp_path, other.state_dict()), reset_head=True)
    assert report.reset == ()
    assert same(network.state_dict(), other.state_dict())


def test_reset_head_forgives_nothing_but_the_head(tmp_path: Path) -> None:
    path = saved(tmp_path, Net(width=16, num_classes=9).state_dict())
    with pytest.raises(ValueError, match=r"of another shape, .*: patch_embed 2"):
        load_checkpoint(Net(), path, reset_head=True)


def test_head_of_a_timm_network(tmp_path: Path) -> None:
    def build(num_classes: int) -> nn.Module:
        network = nn.Sequential(OrderedDict(stem=nn.Linear(3, 4), fc=nn.Linear(4, num_classes)))
        network.default_cfg = {"classifier": "fc"}
        return network

    path = saved(tmp_path, build(7).state_dict())
    with pytest.raises(ValueError, match="fc has 7 classes in the file and 2 in the network"):
        load_checkpoint(build(2), path)
    assert load_checkpoint(build(2), path, reset_head=True).reset == ("fc.weight", "fc.bias")
    assert load_checkpoint(build(2), path, reset_head=True, heads=["fc"]).reset == ("fc.weight", "fc.bias")
    with pytest.raises(ValueError, match=r"2 of another shape, .*: fc 2"):
        load_checkpoint(build(2), path, reset_head=True, heads=["head.l"])


def test_closest_variant_is_guessed(tmp_path: Path) -> None:
    path = saved(tmp_path, Net(**VARIANTS["Large"], num_classes=3).state_dict())
    with pytest.raises(ValueError, match=r"looks like Large or LargeToo: set model\.name=Large"):
        load_checkpoint(Net(), path, variants=variant_shapes)
    path = saved(tmp_path, {"layer1.0.weight": torch.zeros(64, 3), "fc.bias": torch.zeros(10)})
    with pytest.raises(ValueError, match="looks like none of Small, Large, LargeToo"):
        load_checkpoint(Net(), path, variants=variant_shapes)


def test_advice_is_never_what_the_user_has(tmp_path: Path) -> None:
    network, other = Net(), Net(**VARIANTS["Small"])
    del other.head.bn  # as another argument of the network would
    network.extra = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="looks like Small, and so does the network: give the arguments") as caught:
        load_checkpoint(network, saved(tmp_path, other.state_dict()), variants=variant_shapes)
    assert "model.name" not in str(caught.value)


def test_released_variant_with_another_argument(tmp_path: Path) -> None:
    path = saved(tmp_path, create_model("MobileMamba_T2").state_dict())
    with pytest.raises(ValueError, match="MobileMamba_T2, and so does the network") as caught:
        create_model("MobileMamba_T2", d_state=2, checkpoint_path=path)
    assert "set model.name" not in str(caught.value)


def test_file_without_a_head(tmp_path: Path) -> None:
    network, other = Net(), Net()
    weights = {name: value for name, value in other.state_dict().items() if not name.startswith("head.")}
    fresh = copy.deepcopy(network.head.state_dict())
    path = saved(tmp_path, weights)
    with pytest.raises(ValueError, match=r"has no classifier head\.l: fine-tune with -m ft, which starts a new head"):
        load_checkpoint(network, path)
    report = load_checkpoint(network, path, reset_head=True)
    assert set(report.reset) == {f"head.{name}" for name in fresh}
    assert same(network.head.state_dict(), fresh)
    assert torch.equal(network.patch_embed.weight, other.patch_embed.weight)


def test_folded_weights_are_recognised(tmp_path: Path) -> None:
    network = create_model("MobileMamba_T2", num_classes=2)
    plain = saved(tmp_path, network.state_dict(), "plain.pth")
    folded = saved(tmp_path, network.fuse().state_dict(), "folded.pth")
    with pytest.raises(
        ValueError, match="folded network, which cannot be unfolded: name the weights of before"
    ) as told:
        create_model("MobileMamba_T2", num_classes=2, checkpoint_path=folded)
    assert "another network's weights" not in str(told.value)
    with pytest.raises(ValueError, match="The network is folded, the file is not: load the weights first"):
        load_checkpoint(network, plain, variants=released_shapes)
    assert load_checkpoint(network, folded).fits


def test_detector_is_told_from_another_network(tmp_path: Path) -> None:
    weights = {f"backbone.{name}": value for name, value in Net().state_dict().items()} | {"neck.a": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"holds a detector.*python -m model\.convert") as caught:
        load_checkpoint(Net(), saved(tmp_path, {"state_dict": weights}), variants=variant_shapes)
    assert "another network's weights" not in str(caught.value)


def test_variants_are_asked_for_only_to_explain(tmp_path: Path) -> None:
    def never() -> dict:
        raise AssertionError("building every variant costs time")

    assert load_checkpoint(Net(), saved(tmp_path, Net().state_dict()), variants=never).fits


def test_released_names_of_each_variant_are_told_apart(tmp_path: Path) -> None:
    shapes = released_shapes()
    network = create_model("MobileMamba_T2")
    for name in ("MobileMamba_T4", "MobileMamba_B1"):
        weights = {entry: torch.zeros(()).expand(shape) for entry, shape in shapes[name].items()}
        with pytest.raises(ValueError, match=rf"looks like {name}\b"):
            load_checkpoint(network, saved(tmp_path, weights), variants=released_shapes)
