"""Files of torch.export, AOTInductor, ncnn, Core ML, LiteRT and ExecuTorch, run where the system has a runtime."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from model.export import FORMATS, export

SIZE = (64, 64)
# With the default tests, those that take a few seconds; make test-runtimes brings what the last two need.
RUN = [
    "torch",
    pytest.param("aoti", marks=pytest.mark.slow),
    "ncnn",
    pytest.param("litert", marks=pytest.mark.slow),
    pytest.param("executorch", marks=pytest.mark.slow),
]


def write(network, folder, name, **wishes):
    for package in FORMATS[name].PACKAGES:
        pytest.importorskip(package)
    path = folder / f"network{FORMATS[name].SUFFIX}"
    return export(network, path, format=name, size=SIZE, **wishes), path


@pytest.mark.parametrize("name", RUN)
def test_file_gives_what_the_network_gives_in_float64(small, parity_fill, relative_error, tmp_path, request, name):
    if name == "aoti":
        request.getfixturevalue("inductor")
    network = small()
    report, path = write(network, tmp_path, name)
    assert report.agrees
    images = parity_fill.image(1, *SIZE, seed=5)
    (logits,) = FORMATS[name].load(path)(images.numpy())
    with torch.no_grad():
        expected = network.double()(images.double())
    assert logits.shape == expected.shape
    assert relative_error(logits, expected) < 1e-5


@pytest.mark.parametrize("name", [pytest.param("torch", marks=pytest.mark.slow), "ncnn"])
def test_feature_maps_come_in_order(small, parity_fill, relative_error, tmp_path, name):
    network = small()
    report, path = write(network, tmp_path, name, features=True)
    assert report.agrees
    images = parity_fill.image(1, *SIZE, seed=6)
    maps = FORMATS[name].load(path)(images.numpy())
    with torch.no_grad():
        expected = network.double().forward_intermediates(images.double(), indices=(1, 2, 3), intermediates_only=True)
    for one, other in zip(maps, expected, strict=True):
        assert relative_error(one, other) < 1e-5


def test_a_program_takes_any_batch_and_says_what_it_is(small, parity_fill, relative_error, tmp_path):
    network = small()
    _, path = write(network, tmp_path, "torch", batch=None)
    images = parity_fill.image(3, *SIZE)
    (logits,) = FORMATS["torch"].load(path)(images.numpy())
    with torch.no_grad():
        assert relative_error(logits, network.double()(images.double())) < 1e-5
    told = {"metadata.json": ""}
    torch.export.load(path, extra_files=told)
    assert json.loads(json.loads(told["metadata.json"])["size"]) == list(SIZE)


def test_ncnn_keeps_weights_in_16_bits(small, tmp_path):
    whole, path = write(small(), tmp_path, "ncnn")
    facts = json.loads(path.with_suffix(".json").read_text())
    assert json.loads(facts["size"]) == list(SIZE)
    halved, _ = write(small(), tmp_path, "ncnn", fp16=True, overwrite=True)
    assert halved.agrees
    assert halved.num_bytes < 0.65 * whole.num_bytes


@pytest.mark.slow
def test_core_ml_is_converted_and_says_so(small, tmp_path):
    coremltools = pytest.importorskip("coremltools")
    if np.lib.NumpyVersion(np.__version__) >= "2.4.0":
        pytest.skip("coremltools 9 fails with this numpy")
    report, path = write(small(), tmp_path, "coreml", softmax=True)
    model = coremltools.models.MLModel(str(path), skip_model_load=True)
    description = model.get_spec().description
    assert [each.name for each in description.input] == ["images"]
    assert [each.name for each in description.output] == ["probabilities"]
    assert list(description.output[0].type.multiArrayType.shape) == [1, 7]
    assert json.loads(model.user_defined_metadata["size"]) == list(SIZE)
    if report.num_images == 0:
        assert "converted, not run" in str(report)


@pytest.mark.parametrize(
    ("name", "wishes", "reason"),
    [
        ("torch", {"fp16": True}, "without --fp16"),
        ("aoti", {"dynamic_size": True}, "without --dynamic-size"),
        ("ncnn", {"batch": None}, "without dynamic batch"),
        ("ncnn", {"batch": 2}, "without batch above 1"),
    ],
)
def test_what_a_format_lacks_is_refused(small, tmp_path, name, wishes, reason):
    with pytest.raises(ValueError, match=reason):
        write(small(), tmp_path, name, **wishes)
    assert not list(tmp_path.iterdir())
