"""Peers are folded without a change of what they compute; the variants' calls of the scan are as documented."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import timm
import torch
from torch.nn.modules.batchnorm import _BatchNorm

from benchmarks import scan
from benchmarks.network import RIVALS, groups
from benchmarks.networks import NAMES, PEERS, build, fold_peer, literal_name, settle
from benchmarks.plots import ACCURACY
from model import list_models


@pytest.mark.parametrize("name", PEERS)
def test_folding_a_peer_changes_nothing(name):
    torch.manual_seed(0)
    network = settle(timm.create_model(name))
    size = network.default_cfg["input_size"][-1]
    image = torch.randn(1, 3, size, size)
    folded = fold_peer(network)
    with torch.inference_mode():
        expected, actual = network(image), folded(image)
    assert (actual - expected).abs().max() < 1e-4 * expected.abs().max()
    # Norms in front of attention and of the head have no convolution to go into.
    left = {"fastvit_sa12": 2, "starnet_s4": 1}.get(name, 0)
    assert sum(isinstance(module, _BatchNorm) for module in folded.modules()) == left


def test_built_networks_say_what_they_are():
    ours, literal, peer = (build(n) for n in ("MobileMamba_T2", literal_name("MobileMamba_T2"), "shvit_s4"))
    assert (ours.kind, literal.kind, peer.kind) == ("ours", "literal", "peer")
    assert (ours.size, literal.size, peer.size) == (192, 192, 256)
    assert ours.parameters == literal.parameters == 8_806_682
    with pytest.raises(ValueError, match="shvit_s4"):
        build("shvit_s5")


def test_names_that_tables_refer_to_exist():
    assert set(RIVALS) == set(list_models())
    assert {rival for rivals in RIVALS.values() for rival in rivals} <= set(NAMES)
    accuracy = json.loads(ACCURACY.read_text())
    assert set(accuracy["models"]) == {*list_models(), *PEERS}
    assert set(accuracy["longer"]) == set(list_models())
    assert all(entry["source"] for group in ("models", "longer") for entry in accuracy[group].values())


def test_what_is_compared_is_measured_together_and_nothing_is_left_out():
    measured = [[candidate.name for candidate in group] for group in groups([SimpleNamespace(name=n) for n in NAMES])]
    assert {name for group in measured for name in group} == set(NAMES)
    for variant, rivals in RIVALS.items():
        (group,) = (group for group in measured if variant in group)
        assert group == [variant, literal_name(variant), *rivals]
    chosen = [SimpleNamespace(name=name) for name in ("levit_256", "MobileMamba_B2", "cpubone_nano")]
    assert groups(chosen) == [[chosen[1], chosen[0]], [chosen[2]]]


# Per variant: D, side of the map, R and how often, in the order of the stages.
CALLS = {
    "MobileMamba_T2": [(224, 12, 7, 1), (384, 6, 12, 2), (448, 3, 14, 2)],
    "MobileMamba_T4": [(288, 12, 9, 1), (512, 6, 16, 2), (544, 3, 17, 2)],
    "MobileMamba_S6": [(320, 14, 10, 1), (544, 7, 17, 2), (544, 4, 17, 2)],
    "MobileMamba_B1": [(320, 16, 10, 2), (512, 8, 16, 3), (544, 4, 17, 2)],
    "MobileMamba_B2": [(320, 24, 10, 2), (512, 12, 16, 3), (544, 6, 17, 2)],
    "MobileMamba_B4": [(320, 32, 10, 2), (512, 16, 16, 3), (544, 8, 17, 2)],
}


@pytest.mark.parametrize("variant", CALLS)
def test_calls_of_the_scan(variant):
    expected = {scan.Call(d, side * side, rank): count for d, side, rank, count in CALLS[variant]}
    assert scan.calls_of(variant) == expected


def test_floor_of_an_image():
    num_bytes = sum(3 * c.channels * c.length * n * 2 for c, n in scan.calls_of("MobileMamba_B4").items())
    assert round(num_bytes / 1e3) == 6709


def test_bytes_are_those_that_operations_move():
    x, z = torch.ones(2, 5, 4), torch.ones(2, 5, 8)[..., 4:]
    assert scan.count_bytes(lambda: x * z) == 3 * 40 * 4
    assert scan.count_bytes(lambda: x.transpose(1, 2).flip(-1)) == 2 * 40 * 4
    assert scan.count_bytes(lambda: (x[:, 1:], torch.empty_like(x), x.view(-1))) == 0
