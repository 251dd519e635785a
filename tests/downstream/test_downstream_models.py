"""The seven models against the released ones: parameters, names and shapes of all entries, multiply-accumulates."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("mmcv.ops", reason="OpenMMLab is not installed: make downstream")
pytest.importorskip("mmdet.models")
pytest.importorskip("mmseg.models")
pytest.importorskip("mmpretrain.models")

from mmengine.analysis import get_model_complexity_info
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import load_checkpoint

from downstream.forks import find_forks
from downstream.hooks import check_class_counts, check_fit

ROOT = Path(__file__).resolve().parents[2]
PARAMETERS = {
    "maskrcnn": 37_954_985,
    "retinanet": 27_054_253,
    "ssdlite": 18_020_845,
    "ssdlite_512": 18_020_845,
    "deeplabv3": 23_895_013,
    "fpn": 19_758_671,
    "pspnet": 21_469_669,
}
MACS = {  # side of the input in pixels, published 1e9
    "ssdlite": (320, 1.73),
    "ssdlite_512": (512, 4.42),
    "deeplabv3": (512, 4.67),
    "fpn": (512, 5.61),
    "pspnet": (512, 4.50),
}


@pytest.fixture(scope="module")
def build(parity_json):
    """Builds a released model by name, its class counts changed if asked."""
    paths = {name: entry["config"] for name, entry in parity_json("published.json")["downstream"].items()}
    find_forks()

    def build(name, **overrides):
        config = Config.fromfile(ROOT / paths[name])
        config.merge_from_dict(overrides)
        init_default_scope(config.default_scope)
        return MODELS.build(config.model).eval()

    return build


@pytest.fixture(scope="module")
def released(parity_json):
    """The shapes of a released checkpoint's entries."""
    network = parity_json("state_dict.json")["MobileMamba_B1"]
    backbone = {f"backbone.{entry}": shape for entry, shape in network.items() if not entry.startswith("head")}
    entries = parity_json("downstream_state_dict.json")
    return lambda name: {**backbone, **entries[name]["not_backbone"]}


@pytest.fixture
def checkpoint(tmp_path, released):
    """A file in the layout of the released ones: `state_dict` beside `meta`, entries in an order of their own."""

    def save(name):
        weights = {entry: torch.full(shape, 0.01) for entry, shape in sorted(released(name).items())}
        path = tmp_path / f"{name}.pth"
        torch.save({"meta": {"epoch": 12}, "state_dict": weights}, path)
        return path, weights

    return save


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_and_entries_are_the_released_ones_and_load_strictly(build, released, checkpoint, name):
    model = build(name)
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]
    assert {entry: list(value.shape) for entry, value in model.state_dict().items()} == released(name)
    path, weights = checkpoint(name)
    load_checkpoint(model, str(path), strict=True)
    check_fit(model, torch.load(path), origin=str(path))
    own = model.state_dict()
    assert all(torch.equal(own[entry], value.to(own[entry].dtype)) for entry, value in weights.items())


@pytest.mark.parametrize("name", MACS)
def test_multiply_accumulates_are_the_published_ones(build, name):
    size, published = MACS[name]
    model = build(name)
    counted = count_macs(model, torch.zeros(1, 3, size, size))
    if name.startswith("ssdlite"):  # published with blocks3, a part of the model that feeds nothing: we skip it
        counted += count_macs(model.backbone.blocks3, torch.zeros(1, 376, size // 32, size // 32))
    assert counted / 1e9 == pytest.approx(published, rel=0.02)


def count_macs(module, x):
    """Count as OpenMMLab does, which leaves out operators that it does not know, the scans among them."""
    return get_model_complexity_info(module, inputs=(x,), show_table=False, show_arch=False)["flops"]


def test_checkpoint_of_another_variant_is_refused_and_named(build, checkpoint):
    path, _ = checkpoint("ssdlite")
    model = build("ssdlite", **{"model.backbone.variant": "T4"})
    with pytest.raises(ValueError, match=r"(?s)ssdlite\.pth.*set model.backbone.variant=B1") as error:
        check_fit(model, torch.load(path), origin=str(path), backbone_only=True)
    assert len(str(error.value).splitlines()) < 10


def test_checkpoint_of_another_head_is_refused_for_testing_and_taken_to_start_from(build, checkpoint):
    path, _ = checkpoint("fpn")
    model = build("fpn", **{"model.decode_head.num_classes": 19})
    with pytest.raises(ValueError, match=r"(?s)fpn\.pth.*conv_seg.weight 150x128x1x1 for 19x128x1x1.*num_classes"):
        check_fit(model, torch.load(path), origin=str(path))
    check_fit(model, torch.load(path), origin=str(path), backbone_only=True)


class Shapes:
    """A data set of three classes."""

    metainfo = {"classes": ("circle", "square", "triangle")}  # noqa: RUF012


@pytest.mark.parametrize(
    ("name", "heads"),
    [
        ("maskrcnn", ("roi_head.bbox_head", "roi_head.mask_head")),
        ("ssdlite", ("bbox_head",)),
        ("deeplabv3", ("decode_head", "auxiliary_head")),
    ],
)
def test_wrong_class_count_names_both_counts_and_the_entry(build, name, heads):
    fitting = {f"model.{head}.num_classes": 3 for head in heads}
    check_class_counts(build(name, **fitting), Shapes)
    for head in heads:
        message = rf"{head} has num_classes=4, but .* has 3 classes \(circle, square, triangle\): set model\.{head}"
        with pytest.raises(ValueError, match=message):
            check_class_counts(build(name, **{**fitting, f"model.{head}.num_classes": 4}), Shapes)
