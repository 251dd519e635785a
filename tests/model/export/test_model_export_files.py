"""Files of ONNX Runtime and OpenVINO, run by these: any batch and size, options, what is refused."""

from __future__ import annotations

import collections
import contextlib
import importlib.util
import json
import logging

import numpy as np
import pytest
import timm
import torch

from model import create_model, save_pretrained
from model.export import FORMATS, default_request, export
from model.export.__main__ import main

RUNTIMES = {"onnx": "onnxruntime", "openvino": "openvino"}


@pytest.fixture(params=RUNTIMES)
def name(request):
    pytest.importorskip("onnx")
    pytest.importorskip(RUNTIMES[request.param])
    return request.param


def write(network, folder, name, **wishes):
    path = folder / f"network{FORMATS[name].SUFFIX}"
    report = export(network, path, format=name, overwrite=True, **wishes)
    return report, FORMATS[name].load(path), path


@pytest.mark.parametrize("kwargs", [{}, {"scan": "cross", "d_state": 2}], ids=["released", "cross"])
def test_one_file_takes_any_batch_and_size(small, relative_error, tmp_path, name, kwargs):
    network = small(**kwargs)
    report, run, _ = write(network, tmp_path, name, batch=None, dynamic_size=True, size=(64, 64))
    assert report.agrees
    assert report.error < 1e-5
    network.double()
    # The last is larger than what was asked for: ONNX's loop has no limit.
    for shape in ((1, 3, 64, 64), (3, 3, 33, 47), (2, 3, 97, 130), (1, 3, 40, 600)):
        images = torch.randn(shape)
        with torch.no_grad():
            expected = network(images.double())
        assert relative_error(run(images.numpy())[0], expected) < 1e-5, shape


def test_file_for_one_size(small, relative_error, tmp_path, name):
    network = small()
    _, run, _ = write(network, tmp_path, name, batch=2, size=(70, 97))
    images = torch.randn(2, 3, 70, 97)
    with torch.no_grad():
        expected = network.double()(images.double())
    assert relative_error(run(images.numpy())[0], expected) < 1e-5


def test_features_of_a_network_of_timm(relative_error, tmp_path, name):
    backbone = timm.create_model("mobilemamba_t2", features_only=True, out_indices=(3, 4, 5)).eval()
    report, run, _ = write(backbone, tmp_path, name, features=True, size=(64, 96))
    images = torch.randn(1, 3, 64, 96)
    maps = run(images.numpy())
    assert report.agrees
    with torch.no_grad():
        for actual, expected in zip(maps, backbone(images), strict=True):
            assert relative_error(actual, expected) < 1e-5


@pytest.mark.parametrize(("is_bgr", "interpolation"), [(False, "bicubic"), (True, "bilinear")], ids=["RGB", "BGR"])
def test_preprocessing_inside_the_graph(small, relative_error, tmp_path, name, is_bgr, interpolation):
    network = small()
    wishes = {"preprocess": True, "softmax": True, "is_bgr": is_bgr, "size": (64, 48), "interpolation": interpolation}
    _, run, _ = write(network, tmp_path, name, batch=None, **wishes)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 12, 9, 3), dtype=np.uint8)
    pixels = pixels.repeat(20, axis=1).repeat(20, axis=2)  # 240 x 180: larger, and of the same proportions
    (probabilities,) = run(pixels)
    # By hand: 87.5% of either side from the middle, pixels from 0 to 1, ImageNet's mean and deviation.
    images = torch.from_numpy(pixels[..., ::-1].copy() if is_bgr else pixels).permute(0, 3, 1, 2).double() / 255
    images = images[:, :, 15:225, 11:169]
    request = default_request(network, **wishes)
    images = torch.nn.functional.interpolate(images, (64, 48), mode=interpolation, antialias=True)
    mean, std = (torch.tensor(values, dtype=torch.float64).view(3, 1, 1) for values in (request.mean, request.std))
    with torch.no_grad():
        expected = network.double()((images - mean) / std).softmax(1)
    assert relative_error(probabilities, expected) < 1e-4
    np.testing.assert_allclose(probabilities.sum(1), 1, rtol=1e-5)


def test_weights_in_16_bits(small, tmp_path, name):
    network = small()
    whole, _, _ = write(network, tmp_path, name)
    halved, _, _ = write(network, tmp_path, name, fp16=True)
    assert halved.agrees
    assert 1e-7 < halved.error < 1e-2
    assert halved.num_bytes < 0.7 * whole.num_bytes


@pytest.mark.parametrize("dynamic", [False, True], ids=["192", "any-size"])
def test_optimised_graph_is_small(tmp_path, dynamic):
    onnx = pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    network = create_model("MobileMamba_T2")
    export(network, tmp_path / "network.onnx", dynamic_size=dynamic, batch=None)
    options = runtime.SessionOptions()
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    runtime.InferenceSession(tmp_path / "network.onnx", options)
    nodes = onnx.load(tmp_path / "optimised.onnx").graph.node
    counts = collections.Counter(node.op_type for node in nodes)
    assert len(nodes) <= 700
    assert counts["Transpose"] <= 30
    assert not [kind for kind in counts if kind.startswith(("Scatter", "Gather")) and not dynamic]


def test_metadata(small, tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    names = tuple("abcdefg")
    _, _, path = write(small(), tmp_path, "onnx", classes=names, preprocess=True)
    facts = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    assert json.loads(facts["classes"]) == list(names)
    assert json.loads(facts["size"]) == [64, 64]
    assert json.loads(facts["mean"]) == [0.485, 0.456, 0.406]
    assert facts["layout"] == "uint8 NHWC"
    onnx.checker.check_model(path, full_check=True)


def t2_checkpoint(folder, layout):
    """A checkpoint of T2 with five classes, and its network."""
    torch.manual_seed(0)
    network = create_model("mobilemamba_t2", num_classes=5).eval()
    weights = network.state_dict()
    if layout == "folder":
        return save_pretrained(network, folder / "saved"), network
    ours = {"net": weights, "net_E": weights, "class_names": ["a", "b", "c", "d", "e"]}
    torch.save(ours if layout == "ours" else weights, folder / "mobilemamba_t2.pth")
    return folder / "mobilemamba_t2.pth", network


@pytest.mark.parametrize("layout", ["ours", "released", "folder"])
def test_command_takes_every_layout(relative_error, tmp_path, capsys, layout):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    source, network = t2_checkpoint(tmp_path, layout)
    out = tmp_path / "network.onnx"
    assert main([str(source), str(out), "--size", "64", "--num-images", "2"]) == 0
    assert "agrees with PyTorch" in capsys.readouterr().out
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert relative_error(FORMATS["onnx"].load(out)(images.numpy())[0], network(images)) < 1e-5


def test_file_that_does_not_agree_ends_with_1(small, tmp_path, monkeypatch, capsys):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    load = FORMATS["onnx"].load
    monkeypatch.setattr(FORMATS["onnx"], "load", lambda path: lambda images: [1.01 * load(path)(images)[0]])
    source, _ = t2_checkpoint(tmp_path, "released")
    assert main([str(source), str(tmp_path / "network.onnx"), "--size", "64", "--num-images", "1"]) == 1
    assert "DOES NOT AGREE" in capsys.readouterr().out


@pytest.mark.parametrize("fails", [False, True])
def test_openvinos_converter_does_not_silence_the_log(small, tmp_path, monkeypatch, fails):
    openvino = pytest.importorskip("openvino")
    pytest.importorskip("onnx")
    filters = list(logging.getLogger().filters)
    if fails:
        convert = openvino.convert_model
        monkeypatch.setattr(openvino, "convert_model", lambda _: convert(tmp_path / "missing.onnx"))
    with pytest.raises(Exception, match=r"missing\.onnx") if fails else contextlib.nullcontext():
        export(small(), tmp_path / "network.xml", format="openvino")
    assert logging.getLogger().level == logging.WARNING
    assert logging.getLogger().filters == filters


def test_missing_runtime_is_named_with_its_extra(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["mobilemamba_t2", str(tmp_path / "network.xml"), "--format", "openvino"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "mobilemamba[openvino]" in error


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["nothing.pth", "a.onnx"], "no checkpoint at nothing.pth"),
        (["mobilemamba_t2", "a.xml", "--random"], r"has to end in \.onnx"),
        (["mobilemamba_t2", "there.onnx", "--random"], "there.onnx exists and was left as it is"),
        (["mobilemamba_t2", "nowhere/a.onnx", "--random"], "no folder nowhere"),
        (["mobilemamba_t2", "a.onnx", "--random", "--size", "16"], "size 16x16 is too small"),
        (["mobilemamba_t2", "a.onnx", "--random", "--fp16", "--int8"], "exclude each other"),
        (["mobilemamba_t2", "a.onnx", "--random", "--int8"], "name a folder with --calibrate"),
        (["mobilemamba_t2", "a.onnx", "--random", "--images", "empty"], "no pictures in empty"),
        (["mobilemamba_t2", "a.onnx", "--random", "--images", "emptyy"], "no folder emptyy; the nearest in .: empty"),
        (["mobilemamba_t2", "a.onnx", "--random", "--mean", ".5", ".5"], "one for each of 3 channels"),
        (["mobilemamba_t2", "a.onnx", "--random", "--std", "0"], "std above 0"),
        (["mobilemamba_t2", "a.onnx", "--random", "--crop", "87.5"], "above 0 and at most 1, not 87.5"),
        (
            ["mobilemamba_t2", "a.onnx", "--random", "--preprocess", "--interpolation", "box"],
            "not resized by box inside the graph: choose --interpolation of bilinear, bicubic",
        ),
    ],
)
def test_what_cannot_be_is_one_line(tmp_path, monkeypatch, capsys, arguments, reason):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "there.onnx").write_bytes(b"mine")
    with pytest.raises(AssertionError, match=reason):
        assert main(arguments) != 2, capsys.readouterr().err
    assert (tmp_path / "there.onnx").read_bytes() == b"mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "there.onnx"]


def test_interrupted_export_leaves_nothing(small, tmp_path, monkeypatch):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")

    def stop(network, request, path):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(FORMATS["onnx"], "write", stop)
    with pytest.raises(KeyboardInterrupt):
        export(small(), tmp_path / "network.onnx")
    assert not list(tmp_path.iterdir())
