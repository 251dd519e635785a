"""Networks in 8 bits: what is quantised, how far answers move, what is refused."""

from __future__ import annotations

import json
import logging

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from model.export import FORMATS, check, default_request, export
from model.export.deployed import Deployed
from model.export.int8 import find_noise
from model.export.labels import labels_of

SIZE = (64, 64)
NEEDS = {"onnx": "onnxruntime", "openvino": "nncf"}


@pytest.fixture
def pictures(tmp_path):
    """A folder of two classes, as smooth as photographs."""
    generator = np.random.default_rng(0)
    for number in range(12):
        folder = tmp_path / "pictures" / f"class{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize(SIZE, Image.Resampling.BICUBIC).save(folder / f"{number}.png")
    return tmp_path / "pictures"


@pytest.mark.parametrize("name", ["onnx", pytest.param("openvino", marks=pytest.mark.slow)])
def test_int8_is_smaller_and_near(small, tmp_path, pictures, caplog, name):
    pytest.importorskip("onnx")
    pytest.importorskip(NEEDS[name])
    network = small(embed_dim=(64, 96, 128))
    norm = next(module for module in network.modules() if isinstance(module, nn.LayerNorm))
    nn.init.ones_(norm.weight)  # of the first scan, as before training: runtimes leave both out
    nn.init.zeros_(norm.bias)
    wishes = {"size": SIZE, "batch": None}
    request = default_request(network, **wishes)
    images = np.concatenate(check.read_images(request, sorted(pictures.rglob("*.png")), num_made_up=0))
    sizes, answers = [], []
    for kind, quantised in (("float", {}), ("int8", {"int8": True, "calibration": pictures})):
        path = tmp_path / f"{kind}{FORMATS[name].SUFFIX}"
        report = export(network, path, format=name, int8_report=tmp_path / "report.json", **wishes, **quantised)
        sizes.append(report.num_bytes)
        (logits,) = FORMATS[name].load(path)(images)
        answers.append(logits)
    with torch.no_grad():
        expected = network.double()(torch.from_numpy(images).double()).numpy()
    noise = [float(np.square(expected - each).sum() / np.square(expected).sum()) for each in answers]
    assert noise[0] < 1e-9
    assert 1e-9 < noise[1] < 2e-2  # 17 dB
    assert not [record for record in caplog.records if record.name == "root"]  # advice of the quantiser
    assert sizes[1] < 0.6 * sizes[0]  # a small network's graph is no small part of it
    layers = json.loads((tmp_path / "report.json").read_text())
    assert {"network.head", "network.stages.0.0"} <= {layer["name"] for layer in layers}
    assert not any(".scans." in layer["name"] for layer in layers)


def test_only_convolutions_and_the_head_have_8_bits(small, tmp_path, pictures):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    path = tmp_path / "network.onnx"
    export(small(), path, size=SIZE, int8=True, calibration=pictures)
    model = onnx.load(path)
    made_by = {output: node for node in model.graph.node for output in node.output}
    weights = {entry.name: entry for entry in model.graph.initializer}
    scanned = [node for node in model.graph.node if node.op_type == "MatMul" and ".scans." in node.input[1]]
    assert scanned
    assert not any(made_by[node.input[0]].op_type == "DequantizeLinear" for node in scanned)
    for node in model.graph.node:
        if node.op_type == "Conv":
            quantised = weights[made_by[node.input[1]].input[0]]
            scales = weights[made_by[node.input[1]].input[1]]
            assert quantised.data_type == onnx.TensorProto.INT8
            assert list(scales.dims) == [quantised.dims[0]]
    assert json.loads({entry.key: entry.value for entry in model.metadata_props}["size"]) == list(SIZE)


def test_a_layer_that_loses_too_much_stays_in_float():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1)).eval()
    images = [np.random.default_rng(0).standard_normal((1, 3, 8, 8), dtype=np.float32) for _ in range(4)]
    assert not any(noise.is_float for noise in find_noise(network, images))
    images[0][0, :, 0, 0] = 0  # of one image, one pixel far from all others, which needs the whole range
    images[0][0, 0, 0, 0] = 1e4
    first, *_ = find_noise(network, [*images[1:], images[0]])
    quiet = [noise.decibels for noise in find_noise(network, images[1:])]
    assert min(quiet) > 25
    with torch.no_grad():
        network[0].weight[:, 0] = 0  # nor does the layer look at that pixel's channel
    first, *_ = find_noise(network, images)
    assert first.is_float


@pytest.mark.parametrize(("max_drop", "agrees"), [(1.0, False), (5.0, True)])
def test_more_than_the_allowed_drop_does_not_agree(small, parity_fill, max_drop, agrees):
    network = Deployed(small(), default_request(small())).eval()
    images = [parity_fill.image(1, *SIZE, seed=seed).numpy() for seed in range(25)]
    with torch.no_grad():
        answers = {image.tobytes(): network(torch.from_numpy(image)).numpy() for image in images}
    labels = [int(answer.argmax()) for answer in answers.values()]
    answers[images[3].tobytes()] = -answers[images[3].tobytes()]

    def run(image):
        return [answers[image.tobytes()]]

    request = default_request(small(), int8=True, calibration=".", max_drop=max_drop)
    report = check.compare(run, network, request, images, num_bytes=1, labels=labels)
    assert (report.top1_before, report.top1) == (100.0, 96.0)
    assert report.agrees is agrees
    assert "top-1 96.00%" in str(report)


def test_classes_are_folders(pictures):
    files = sorted(pictures.rglob("*.png"))
    assert labels_of(files, pictures) == [0] * 6 + [1] * 6
    assert labels_of(files, pictures, ["class1", "other", "class0"]) == [2] * 6 + [0] * 6
    assert labels_of(files, pictures, ["other"]) is None
    (inside,) = {file.parent for file in files[:6]}
    assert labels_of(files[:6], inside) is None


@pytest.mark.slow
def test_openvino_keeps_squeeze_excitation_in_8_bits_and_the_scan_in_float(small, tmp_path, pictures):
    openvino = pytest.importorskip("openvino")
    pytest.importorskip("nncf")
    path = tmp_path / "network.xml"
    export(small(), path, format="openvino", size=SIZE, int8=True, calibration=pictures)
    weights = {}
    for node in openvino.Core().read_model(path).get_ops():
        if node.get_type_name() == "Constant" and node.get_friendly_name().startswith("network."):
            weights[node.get_friendly_name()] = node.get_element_type()
    gates = [kind for name, kind in weights.items() if ".reduce." in name or ".expand." in name]
    assert [kind for kind in gates if kind == openvino.Type.i8]
    assert not [name for name, kind in weights.items() if ".scans." in name and kind == openvino.Type.i8]


@pytest.mark.slow
def test_nncf_is_quiet_and_the_log_is_as_it_was(small, tmp_path, pictures, caplog):
    pytest.importorskip("openvino")
    pytest.importorskip("nncf")
    log = logging.getLogger("nncf")
    log.addHandler(caplog.handler)
    level = log.level
    export(small(), tmp_path / "network.xml", format="openvino", size=SIZE, int8=True, calibration=pictures)
    log.removeHandler(caplog.handler)
    assert not [record for record in caplog.records if record.name == "nncf" and record.levelno < logging.ERROR]
    assert (log.level, caplog.handler.level) == (level, logging.NOTSET)
