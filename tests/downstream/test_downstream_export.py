"""Exported detectors and segmentors, run by ONNX Runtime, against the models of mmdet and mmseg themselves."""

from __future__ import annotations

import functools
import json

import numpy as np
import pytest
import torch
from PIL import Image
from tool_cases import CONFIGS, DETECTORS, DOWNSTREAM, task_of

pytest.importorskip("mmcv.ops", reason="OpenMMLab is not installed: make downstream")
pytest.importorskip("mmdet.models")
pytest.importorskip("mmseg.models")
pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed")

import onnxruntime

from downstream.data.shapes import draw_scene
from downstream.export.check import compare_detections, compare_labels, predict
from downstream.tools import export as exporting
from downstream.tools.inference import build_network
from downstream.tools.settings import load_config

# The layers whose outputs' spread decides whether random weights find anything that can be told apart.
SPREADS = {
    "maskrcnn": {
        "rpn_head.rpn_cls": 2.0,
        "rpn_head.rpn_reg": 0.3,
        "roi_head.bbox_head.fc_cls": 3.0,
        "roi_head.bbox_head.fc_reg": 1.0,
        "roi_head.mask_head.conv_logits": 2.0,
    },
    "retinanet": {"bbox_head.retina_cls": 0.5, "bbox_head.retina_reg": 0.3},
    "ssdlite": {
        **{f"bbox_head.cls_convs.{level}.1": 2.0 for level in range(6)},
        **{f"bbox_head.reg_convs.{level}.1": 1.0 for level in range(6)},
    },
    "fpn": {"decode_head.conv_seg": 2.0},
    "deeplabv3": {"decode_head.conv_seg": 2.0},
    "pspnet": {"decode_head.conv_seg": 2.0},
}
SIZE = (160, 224)


def config_path(name):
    return str(DOWNSTREAM / task_of(name) / CONFIGS[name])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Write a checkpoint of random weights that find something, once: a model's name -> path."""

    @functools.cache
    def write(name):
        torch.manual_seed(0)
        network = build_network(load_config(config_path(name), {"model.backbone.pretrained": False}), device="cpu")
        if name == "retinanet":
            network.bbox_head.retina_cls.bias.data.fill_(-2)
        image = draw_scene(*SIZE, seed=(9,)).image
        for layer, spread in SPREADS[name.removesuffix("_512")].items():
            rescale(network, network.get_submodule(layer), image, spread)
        path = tmp_path_factory.mktemp("weights") / f"{name}.pth"
        torch.save({"state_dict": network.state_dict()}, path)
        return path

    return write


def rescale(network, layer, image, spread):
    """Scale a layer's weights so that its outputs for an image have a standard deviation."""
    outputs = []
    with layer.register_forward_hook(lambda _, __, output: outputs.append(output.flatten())):
        predict(network, image)
    layer.weight.data *= spread / torch.cat(outputs).std()


def export(name, checkpoint, out, *options, more=()):
    arguments = (
        config_path(name),
        checkpoint,
        out,
        *options,
        "--cfg-options",
        "model.backbone.pretrained=False",
        *more,
    )
    return exporting.main([str(argument) for argument in arguments])


def session(path):
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize(
    "name",
    [name if name in ("ssdlite", "fpn") else pytest.param(name, marks=pytest.mark.slow) for name in CONFIGS],
)
def test_one_file_serves_every_size(checkpoint, tmp_path, capsys, name):
    out = tmp_path / "a model.onnx"
    assert export(name, checkpoint(name), out, "--dynamic-size", "--size", *SIZE) == 0
    said = capsys.readouterr().out
    for height, width in (SIZE, SIZE[::-1], (SIZE[0] * 3 // 4 + 1, SIZE[1] - 1)):
        assert f"drawn {height} x {width}: agrees" in said
    # Not because nothing is found, or the same label everywhere.
    run = session(out)
    scene = draw_scene(133, 257, seed=(5,)).image
    found = dict(zip([output.name for output in run.get_outputs()], run.run(None, {"image": scene[None]}), strict=True))
    if name in DETECTORS:
        assert len(found["boxes"]) == len(found["scores"]) == len(found["labels"]) > 5
        assert len(np.unique(found["labels"])) > 3
        assert (np.diff(found["scores"]) <= 0).all()
    else:
        assert found["labels"].shape == (1, 133, 257)
        assert len(np.unique(found["labels"])) > 3
    facts = run.get_modelmeta().custom_metadata_map
    assert json.loads(facts["size"]) == list(SIZE)
    assert json.loads(facts["classes"])[-1] == ("toothbrush" if name in DETECTORS else "flag")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["maskrcnn", "fpn"])
def test_a_file_of_one_size_and_pictures_of_ones_own(checkpoint, tmp_path, capsys, name):
    for number, size in enumerate(((100, 300), (250, 120))):
        Image.fromarray(draw_scene(*size, seed=(number,)).image).save(tmp_path / f"{number}.png")
    out = tmp_path / "model.onnx"
    assert export(name, checkpoint(name), out, "--size", *SIZE, "--images", tmp_path) == 0
    assert capsys.readouterr().out.count("png: agrees") == 2
    (taken,) = session(out).get_inputs()
    assert taken.shape == [1, *SIZE, 3]


@pytest.mark.slow
def test_nothing_found_is_an_empty_answer(checkpoint, tmp_path):
    out = tmp_path / "model.onnx"
    strict = ("model.test_cfg.rcnn.score_thr=0.99999",)
    assert export("maskrcnn", checkpoint("maskrcnn"), out, "--size", *SIZE, more=strict) == 0
    answers = session(out).run(None, {"image": np.zeros((1, *SIZE, 3), np.uint8)})
    assert [answer.shape for answer in answers] == [(0, 4), (0,), (0,), (0, *SIZE)]


def test_a_file_that_differs_ends_in_exit_code_1(checkpoint, tmp_path, capsys, monkeypatch):
    def load(path):
        return lambda image: {"labels": np.zeros((1, *SIZE), np.int64)}

    monkeypatch.setattr(exporting, "load", load)
    monkeypatch.setattr(exporting, "write", lambda graph, path, **_: path.write_bytes(b""))
    assert export("fpn", checkpoint("fpn"), tmp_path / "model.onnx", "--size", *SIZE) == 1
    assert "DIFFERS, the same label at " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--size", "32"), "--size 32: give a side, or height and width, of 64 to 2048 pixels"),
        (("--images", "."), "--images .: there are no pictures"),
        (("--size", "64"), "no checkpoint at "),
        (("absent/model.onnx",), "absent/model.onnx: give a name that ends in .onnx, in a folder that exists"),
    ],
)
def test_bad_input_is_one_line(tmp_path, capsys, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    out = () if options[0].endswith(".onnx") else (tmp_path / "model.onnx",)
    assert export("fpn", tmp_path / "absent.pth", *out, *options) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error
    assert not (tmp_path / "model.onnx").exists()


def test_a_model_of_another_kind_is_refused(checkpoint, tmp_path, capsys):
    windows = ("model.test_cfg.mode=slide", "model.test_cfg.crop_size=(64,64)", "model.test_cfg.stride=(32,32)")
    assert export("fpn", checkpoint("fpn"), tmp_path / "model.onnx", more=windows) == 2
    assert "model.test_cfg.mode=slide cuts images into windows: set it to whole" in capsys.readouterr().err


def detections(scores, boxes=None, masks=None):
    boxes = [[10 * i, 0, 10 * i + 8, 20] for i in range(len(scores))] if boxes is None else boxes
    answer = {
        "boxes": np.array(boxes, np.float32).reshape(-1, 4),
        "scores": np.array(scores, np.float32),
        "labels": np.arange(len(scores)) % 2,
    }
    return answer if masks is None else {**answer, "masks": np.array(masks)}


@pytest.mark.parametrize(
    ("change", "agrees"),
    [
        (lambda found: found, True),
        (lambda found: found["boxes"].__iadd__(0.4), True),
        (lambda found: found["boxes"].__iadd__(0.6), False),
        (lambda found: found["labels"].__setitem__(0, 1), False),
        (lambda found: found.update({name: values[::-1] for name, values in found.items()}), True),
        (lambda found: found.update({name: values[:-1] for name, values in found.items()}), False),
    ],
)
def test_boxes_are_compared_by_place_and_class(change, agrees):
    expected, found = detections([0.9, 0.8, 0.7]), detections([0.9, 0.8, 0.7])
    change(found)
    for pair in ((found, expected), (expected, found)):
        assert compare_detections(*pair, limit=100, threshold=0.05).agrees is agrees


def test_a_box_at_the_threshold_may_be_in_one_answer_alone():
    expected, found = detections([0.9, 0.0504]), detections([0.9])
    assert compare_detections(found, expected, limit=100, threshold=0.05).agrees
    assert not compare_detections(found, expected, limit=100, threshold=0.01).agrees
    # Of boxes at the limit, too, one may give way to another.
    other = detections([0.9, 0.0504], boxes=[[0, 0, 8, 20], [50, 50, 60, 60]])
    assert compare_detections(other, expected, limit=2, threshold=0.01).agrees


def test_masks_and_labels_are_compared_by_pixel():
    masks = np.zeros((1, 50, 50), bool)
    two, three = masks.copy(), masks.copy()
    two[0, 0, :2] = three[0, 0, :3] = True
    for other, agrees in ((two, True), (three, False)):
        pair = detections([0.9], masks=other), detections([0.9], masks=masks)
        assert compare_detections(*pair, limit=100, threshold=0.05).agrees is agrees
        assert compare_labels({"labels": other}, {"labels": masks}).agrees is agrees
