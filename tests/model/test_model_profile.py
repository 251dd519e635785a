"""MACs against the published ones; a profile's parts against counts of their own and a made-up clock."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from torch import nn

from model import create_model
from model.mobilemamba import VARIANTS
from model.profile import count_macs, main, profile
from model.profile_hooks import Clock, find_parts, new_bytes


@pytest.mark.parametrize("name", VARIANTS)
def test_macs_are_within_a_fifth_of_a_percent_of_the_published(name, parity_json):
    published = parity_json("published.json")["imagenet"][name.lower()]
    expected = float(published["flops"].removesuffix("M")) * 1e6  # MACs, called FLOPs there
    assert count_macs(create_model(name), published["size"]) == pytest.approx(expected, rel=0.002)


class Wait(nn.Module):
    """A layer that takes so long on a clock of its own."""

    def __init__(self, seconds, inner=None):
        super().__init__()
        self.seconds = seconds
        self.inner = inner

    def forward(self, x):
        Wait.now += self.seconds / 2
        x = x if self.inner is None else self.inner(x)
        Wait.now += self.seconds / 2
        return x


def test_times_are_those_of_each_layer_by_itself(monkeypatch):
    """A layer's time is not counted again in what is around it, and all parts add up to the whole pass."""
    Wait.now = 0.0
    monkeypatch.setattr(Clock, "now", lambda clock: Wait.now)
    network = nn.Sequential()
    network.add_module("stem", Wait(1.0))
    network.add_module("body", nn.Sequential(Wait(2.0, Wait(4.0)), nn.Conv2d(3, 3, 1, bias=False), Wait(8.0)))
    network.feature_info = [{"module": "stem"}, {"module": "body.0"}, {"module": "body"}]
    found = profile(network.eval(), torch.zeros(1, 3, 8, 8), runs=5, warmup=0)
    seconds = {(part.stage, part.kind): part.seconds for part in found.parts}
    assert seconds == {
        ("stem", "activation and others"): 1.0,
        ("body.0", "between layers"): 2.0,
        ("body.0", "activation and others"): 4.0,
        ("body", "activation and others"): 8.0,
        ("body", "pointwise convolution"): 0.0,
    }
    assert found.seconds == 15.0
    assert [part.share for part in found.sums("stage")] == pytest.approx([1 / 15, 6 / 15, 8 / 15])


@pytest.mark.parametrize("fuse", [False, True])
def test_parts_add_up_to_the_network(fuse):
    network = create_model("MobileMamba_T2", num_classes=9).eval()
    macs = count_macs(network, 64)
    network = network.fuse() if fuse else network
    images = torch.zeros(2, 3, 64, 64)
    found = profile(network, images, runs=1, warmup=0)
    assert sum(part.parameters for part in found.parts) == sum(value.numel() for value in network.parameters())
    # Folding leaves the batch norms' operations out.
    assert sum(part.macs for part in found.parts) == pytest.approx(2 * macs, rel=0.03 if fuse else 1e-9)
    assert sum(part.share for part in found.parts) == pytest.approx(1)
    stages = {part.stage: part for part in found.sums("stage")}
    assert list(stages)[-5:] == ["patch_embed", "blocks1", "blocks2", "blocks3", "head"]
    for name, part in stages.items():
        module = dict(network.named_modules()).get(name)
        own = 0 if module is None else sum(value.numel() for value in module.parameters())
        assert part.parameters == own, name
    kinds = {part.kind: part for part in found.sums("kind")}
    if not fuse:
        assert kinds["scan"].macs > 0
        depthwise = [m for m in network.modules() if isinstance(m, nn.Conv2d) and m.groups == m.in_channels > 1]
        assert kinds["depthwise convolution"].parameters == sum(v.numel() for m in depthwise for v in m.parameters())
    assert network(images).shape == (2, 9)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())


def test_maps_count_once():
    """Not a second time where a layer changes one in place or hands it on."""
    network = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.ReLU(inplace=True), nn.Sequential(nn.Identity()))
    network.append(nn.AvgPool2d(2))
    with torch.no_grad():
        assert new_bytes(network, torch.zeros(2, 3, 8, 8)) == {"0": 2 * 5 * 64 * 4, "3": 2 * 5 * 16 * 4}


def test_a_peers_stages_are_those_it_names():
    network = create_model("timm_mobilenetv3_small_050").eval()
    stages = {stage for stage, _ in find_parts(network).values()}
    assert {info["module"] for info in network.feature_info} <= stages
    assert "classifier" in stages


def test_the_command(tmp_path, capsys):
    files = {kind: tmp_path / f"t2.{end}" for kind, end in (("json", "json"), ("plot", "svg"), ("trace", "trace.json"))}
    options = [option for kind, path in files.items() for option in (f"--{kind}", str(path))]
    assert main(["MobileMamba_T2", "--size", "64", "--runs", "2", *options]) == 0
    text = capsys.readouterr().out
    parts = json.loads(files["json"].read_text())["parts"]
    by_stage = {stage: sum(part["share"] for part in parts if part["stage"] == stage) for stage in ("blocks1", "head")}
    for stage, share in by_stage.items():
        (line,) = (line for line in text.splitlines() if line.startswith(stage))
        assert line.endswith(f"{100 * share:.1f} %")
    svg = ElementTree.parse(files["plot"]).getroot()
    bars = [bar for bar in svg.iter("{http://www.w3.org/2000/svg}rect") if len(bar)]
    assert len(bars) == len(parts)
    widths = [float(bar.get("width")) for bar in bars]
    shares = sorted(part["share"] for part in parts)
    assert sorted(widths) == pytest.approx([share / shares[-1] * max(widths) for share in shares], abs=0.15)
    names = {event.get("name") for event in json.loads(files["trace"].read_text())["traceEvents"]}
    assert {"blocks1.0 (Block)", "head (BatchNormLinear)"} <= names
    assert main(["--plot", "a.png"]) == 2
    assert "error: --plot a.png: expected a file name that ends in .svg" in capsys.readouterr().err
    with pytest.raises(ValueError, match="runs >= 1"):
        profile(nn.ReLU(), torch.zeros(1), runs=0)


def test_a_trace_without_a_gpu_reports_no_error(tmp_path):
    program = (
        "import sys, torch; from model.profile_trace import new_trace\n"
        "with new_trace(torch.device('cpu')) as trace: torch.ones(3).exp()\n"
        "trace.export_chrome_trace(sys.argv[1])"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "trace.json")]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert "aten::exp" in {event.get("name") for event in events}
