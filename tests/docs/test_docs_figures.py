"""The README's figures are what their scripts draw, from the network and the results as they are."""

from __future__ import annotations

import inspect
import json
import re
import runpy
from pathlib import Path

from benchmarks.plots import draw_readme
from model.mobilemamba import MobileMamba

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"


def texts(svg):
    return sorted(re.findall(r"<text[^>]*>([^<]+)</text>", svg))


def test_the_network_is_as_drawn():
    script = runpy.run_path(str(DOCS / "draw_network.py"))
    svg = script["draw"]()
    assert svg == (DOCS / "network.svg").read_text(encoding="utf-8"), "run python docs/draw_network.py"
    assert {"Stage 1", "Stage 2", "Stage 3", "Mixer", "WTE-Mamba", "MK-DeConv", "Identity"} <= set(texts(svg))


def test_the_drawn_stages_are_those_of_the_network():
    stages = runpy.run_path(str(DOCS / "draw_network.py"))["STAGES"]
    parameters = inspect.signature(MobileMamba).parameters
    for name in ("global_ratio", "local_ratio"):
        assert [getattr(stage, name) for stage in stages] == list(parameters[name].default)
    assert [stage.kernel for stage in stages] == list(parameters["kernels"].default)
    network = MobileMamba(embed_dim=(48, 48, 48), depth=(1, 1, 1))
    assert [stage.stride for stage in stages] == [info["reduction"] for info in network.feature_info[1:]]


def test_the_plot_is_that_of_the_results(tmp_path):
    """By its labels, as the drawing itself may differ between versions of matplotlib."""
    (path,) = (ROOT / "benchmarks" / "results" / "avx2").glob("network-*.json")
    result = json.loads(path.read_text())
    svg = draw_readme(result, tmp_path / "plot.svg").read_text(encoding="utf-8")
    assert texts(svg) == texts((DOCS / "accuracy-speed.svg").read_text(encoding="utf-8"))
    assert {"T2", "T4", "S6", "B1", "B2", "B4", "mobilenetv4_conv_medium"} <= set(texts(svg))
    assert "prefers-color-scheme: dark" in svg
